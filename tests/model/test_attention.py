"""Latent attention against its formulas, and heads that RoPE turns in part."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from distmoe.comm.context import WHOLE, ContextPart, SequenceGather
from distmoe.config import Config, MlaConfig, ModelConfig, resolve
from distmoe.engines.adamw import decays
from distmoe.kernels.testing import assert_as_good_as
from distmoe.model.attention import attention_sizes, make_attention
from distmoe.model.causal_attention import (
    _up_to_the_last,
    attend,
    dense_mask,
    document_mask,
)
from distmoe.model.init import initialize
from distmoe.model.mla import LATENT_NORM_EPS, LatentAttention
from distmoe.model.rope import rope_tables, rotate
from distmoe.model.transformer import Transformer

B, S, H, A = 2, 7, 16, 2
NOPE, ROPE, V, RANK = 6, 4, 8, 12
# Two documents in the first row.
START_BS = torch.tensor([[0] * 4 + [4] * 3, [0] * 7])


def model_with(q_lora_rank: int) -> ModelConfig:
    mla = MlaConfig(q_lora_rank, RANK, NOPE, ROPE, V)
    model = ModelConfig(vocab_size=8, hidden_size=H, n_heads=A, attention="mla", mla=mla)
    return resolve(Config(model=model), 1).model


def filled(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.5 if parameter.ndim == 1 else 0.0, 0.4, generator=generator)
    return module


def turned(x_X: Tensor, position: int) -> Tensor:
    """Neighbours as complex numbers, times those of the angles."""
    angle = position * 10000.0 ** (-torch.arange(0, ROPE, 2, dtype=x_X.dtype) / ROPE)
    pairs = torch.view_as_complex(x_X.view(-1, 2)) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(pairs).flatten()


def by_formula(layer: LatentAttention, x_BSH: Tensor) -> Tensor:
    """Head by head and query by query."""
    weight = dict(layer.named_parameters())

    def normed(x: Tensor, name: str) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], weight[f"{name}.weight"], LATENT_NORM_EPS)

    def times(x: Tensor, name: str) -> Tensor:
        return x @ weight[f"{name}.weight"].T

    latent = layer.q_lora_rank
    q = (
        times(normed(times(x_BSH, "q_a_proj"), "q_a_norm"), "q_b_proj")
        if latent
        else times(x_BSH, "q_proj")
    ).view(B, S, A, NOPE + ROPE)
    down = times(x_BSH, "kv_a_proj")
    kv = times(normed(down[..., :RANK], "kv_a_norm"), "kv_b_proj").view(B, S, A, NOPE + V)
    y = torch.zeros(B, S, A, V, dtype=x_BSH.dtype)
    for b, starts in enumerate(START_BS.tolist()):
        for a in range(A):
            for s, start in enumerate(starts):
                scores = [
                    q[b, s, a, :NOPE] @ kv[b, k, a, :NOPE]
                    + turned(q[b, s, a, NOPE:], s) @ turned(down[b, k, RANK:], k)
                    for k in range(start, s + 1)
                ]
                prob = (torch.stack(scores) / (NOPE + ROPE) ** 0.5).softmax(0)
                y[b, s, a] = prob @ kv[b, start : s + 1, a, NOPE:]
    return times(y.flatten(2), "o_proj")


@pytest.fixture
def x_BSH() -> Tensor:
    return torch.randn(B, S, H, generator=torch.Generator().manual_seed(0))


def tables(rotary_dim: int = ROPE) -> tuple[Tensor, Tensor]:
    return rope_tables(torch.arange(S), rotary_dim, model=ModelConfig())


def outcomes(
    layer: nn.Module, x_BSH: Tensor, dtype: torch.dtype, *, formula: bool = False
) -> list[Tensor]:
    """Result and gradients."""
    layer, x_BSH = layer.to(dtype), x_BSH.detach().to(dtype).requires_grad_()
    cos, sin = (table.to(dtype) for table in tables())
    mask = dense_mask(START_BS)
    out_BSH = by_formula(layer, x_BSH) if formula else layer(x_BSH, cos, sin, mask)
    dout_BSH = torch.randn(out_BSH.shape, generator=torch.Generator().manual_seed(2))
    inputs = [x_BSH, *layer.parameters()]
    return [out_BSH.detach(), *torch.autograd.grad(out_BSH, inputs, dout_BSH.to(dtype))]


@pytest.mark.parametrize("q_lora_rank", [0, 10])
def test_latent_attention_is_its_formulas(q_lora_rank: int, x_BSH: Tensor) -> None:
    model = model_with(q_lora_rank)
    layer = filled(make_attention(model, SequenceGather(None)))
    got = outcomes(layer, x_BSH, torch.float32)
    same = outcomes(layer, x_BSH, torch.float32, formula=True)
    want = outcomes(layer, x_BSH, torch.float64, formula=True)
    for number, three in enumerate(zip(got, same, want, strict=True)):
        assert_as_good_as(*three, str(number))
    assert sorted(attention_sizes(model).shapes) == sorted(
        tuple(parameter.shape) for parameter in layer.parameters()
    )


def test_a_part_of_a_head_is_turned() -> None:
    x_BASD = torch.randn(B, A, S, 8, generator=torch.Generator().manual_seed(0))
    got = rotate(x_BASD, *tables(rotary_dim=4))
    assert torch.equal(got[..., :4], rotate(x_BASD[..., :4], *tables(rotary_dim=4)))
    assert torch.equal(got[..., 4:], x_BASD[..., 4:])
    assert not torch.equal(got[..., 1:, :4], x_BASD[..., 1:, :4])
    model = resolve(Config(model=ModelConfig(partial_rotary_factor=0.25)), 1).model
    assert attention_sizes(model).rotary_dim == model.head_dim // 4
    assert attention_sizes(replace(model, partial_rotary_factor=1.0)).rotary_dim == model.head_dim


def test_biases_begin_at_zero_and_do_not_decay() -> None:
    config = resolve(Config(model=ModelConfig(vocab_size=8, n_layers=1, qkv_bias=True)), 1)
    model = Transformer(config)
    initialize(model, seed=1)
    biases = {name: p for name, p in model.named_parameters() if name.endswith(".bias")}
    assert [name.split(".")[-2] for name in biases] == ["q_proj", "k_proj", "v_proj"]
    assert not any(bias.any() for bias in biases.values())
    assert not any(map(decays, biases))
    assert decays("blocks.0.attention.q_proj.weight")


def attention_inputs(num_positions: int, *dims: int) -> list[Tensor]:
    """Of four query heads and two key heads: q, k, v, and dy of all positions."""
    generator = torch.Generator().manual_seed(0)
    q, v = dims
    shapes = [(2, heads, num_positions, dim) for heads, dim in ((4, q), (2, q), (2, v), (4, v))]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def attended(drawn: list[Tensor], part: ContextPart, dtype: torch.dtype) -> list[Tensor]:
    """y and dq of the positions of a part; of all keys and values what these queries add to dk and
    dv."""
    q, k, v, dy = (x.to(dtype) for x in drawn)
    own_S = part.positions(q.shape[2] // part.size, q.device)
    inputs = [x.detach().requires_grad_() for x in (q[:, :, own_S], k, v)]
    y = attend(*inputs, None, part=part)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy[:, :, own_S])]


@pytest.mark.parametrize("v_dim", [16, 8])
@pytest.mark.parametrize("size", [2, 3])
def test_parts_attend_as_the_whole(size: int, v_dim: int) -> None:
    drawn = attention_inputs(12, 16, v_dim)
    want = attended(drawn, WHOLE, torch.float32)
    sums = [torch.zeros_like(x) for x in want[2:]]
    for rank in range(size):
        part = ContextPart(rank, size)
        got, own_S = attended(drawn, part, torch.float32), part.positions(12 // size)
        for one, other in zip(got[:2], want[:2], strict=True):
            torch.testing.assert_close(one, other[:, :, own_S])
        sums = [one + other for one, other in zip(sums, got[2:], strict=True)]
    for one, other in zip(sums, want[2:], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore")
def test_the_mask_of_a_chunk_is_what_a_gpu_is_asked_for() -> None:
    """torch has a kernel for it there, and makes a tensor of it on a CPU, with warnings."""
    q, k, v, _ = attention_inputs(12, 16, 16)
    got, want = (
        scaled_dot_product_attention(q[:, :, :4], k, v, attn_mask=mask, enable_gqa=True)
        for mask in (causal_lower_right(4, 12), _up_to_the_last(4, 12, q.device))
    )
    assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("v_dim", [128, 64])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_part_has_a_fused_kernel(rank: int, v_dim: int) -> None:
    drawn = [x.cuda() for x in attention_inputs(512, 128, v_dim)]
    part = ContextPart(rank, 2)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        got = attended(drawn, part, torch.bfloat16)
    with sdpa_kernel(SDPBackend.MATH):
        same, want = (attended(drawn, part, dtype) for dtype in (torch.bfloat16, torch.float32))
    for name, *three in zip(("y", "dq", "dk", "dv"), got, same, want, strict=True):
        assert_as_good_as(*three, name)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("qk_dim", "v_dim"), [(192, 128), (96, 64)])
def test_values_of_another_size_have_a_fused_kernel(qk_dim: int, v_dim: int, masked: bool) -> None:
    """Inside of documents it is FlexAttention's."""
    start_BS = torch.arange(500, device="cuda").expand(2, -1) // 150 * 150
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 500, dim) for dim in (qk_dim, qk_dim, v_dim, v_dim)]
    drawn = [torch.randn(shape, generator=generator).cuda() for shape in shapes]

    def results(dtype: torch.dtype, mask: object) -> list[Tensor]:
        *inputs, dy = (x.to(dtype).detach().requires_grad_() for x in drawn)
        y_BASD = attend(*inputs, mask if masked else None)
        return [y_BASD.detach(), *torch.autograd.grad(y_BASD, inputs, dy.detach())]

    fused = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    ]
    with sdpa_kernel(fused):
        got = results(torch.bfloat16, document_mask(start_BS))
    with sdpa_kernel(SDPBackend.MATH):
        same, want = (
            results(dtype, dense_mask(start_BS)) for dtype in (torch.bfloat16, torch.float32)
        )
    for name, *three in zip(("y", "dq", "dk", "dv"), got, same, want, strict=True):
        assert_as_good_as(*three, name)


def test_waits_of_attention_and_of_experts_have_names_of_their_own() -> None:
    """Or a trace would count both as passes of one layer."""
    config = resolve(Config(model=model_with(0)), 1)
    with torch.device("meta"):
        block = Transformer(config).blocks[-1]
    assert block.gather.exchange.observer.layer == "layer 3: attention"
    assert {observer.layer for observer in block.mlp.observers()} == {"layer 3"}
