"""Documents that are packed into one sequence, against each document alone."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from distmoe.comm.context import ContextPart
from distmoe.config import Config, DataConfig, ModelConfig, MoEConfig, RoundingConfig, TrainConfig
from distmoe.data.batches import Batch, mask_documents
from distmoe.kernels.testing import assert_as_good_as
from distmoe.model.causal_attention import (
    BLOCK,
    attend,
    block_mask,
    dense_mask,
    document_mask,
)
from distmoe.model.init import initialize
from distmoe.model.linear_cross_entropy import IGNORE
from distmoe.model.transformer import Transformer

S, V, END = 16, 40, 0
# Documents of two rows, each with its end.
LENGTHS = ((5, 9, 2), (1, 15))
CONFIG = Config(
    model=ModelConfig(
        vocab_size=V,
        hidden_size=16,
        n_layers=3,
        n_dense_layers=1,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        intermediate_size=24,
        init_std=0.2,
    ),
    # Rounding decides about all tokens together; without it a document's routing is its own.
    moe=MoEConfig(
        hidden_size=16,
        intermediate_size=8,
        num_experts=4,
        top_k=2,
        rounding=RoundingConfig("none", tile=8),
    ),
    data=DataConfig(seq_len=S),
    train=TrainConfig(dtype="fp32"),
)


@pytest.fixture(scope="module")
def packed() -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens_BS = torch.randint(1, V, (len(LENGTHS), S), generator=generator)
    for row, lengths in enumerate(LENGTHS):
        tokens_BS[row, torch.tensor(lengths).cumsum(0) - 1] = END
    following = torch.randint(1, V, (len(LENGTHS), 1), generator=generator)
    labels_BS = torch.cat([tokens_BS[:, 1:], following], dim=1)
    return mask_documents(Batch(tokens_BS, labels_BS), eod_id=END)


def documents(batch: Batch) -> list[Batch]:
    """Each as a batch of its own."""
    found = []
    for row, lengths in enumerate(LENGTHS):
        pieces = zip(
            batch.tokens_BS[row].split(lengths), batch.labels_BS[row].split(lengths), strict=True
        )
        found += [Batch(tokens[None], labels[None]) for tokens, labels in pieces]
    return found


def test_mask_by_hand(packed: Batch) -> None:
    assert packed.start_BS is not None
    assert packed.start_BS.tolist() == [[0] * 5 + [5] * 9 + [14] * 2, [0] + [1] * 15]
    assert (packed.labels_BS == IGNORE).nonzero().tolist() == [
        [0, 4],
        [0, 13],
        [0, 15],
        [1, 0],
        [1, 15],
    ]
    assert packed.sum_of_squares() == 25 + 81 + 4 + 1 + 225
    assert Batch(packed.tokens_BS, packed.labels_BS).sum_of_squares() == 2 * S * S


def test_a_document_without_its_end_fills_the_row() -> None:
    tokens_BS = torch.tensor([[3, 4, 5], [3, 4, END]])
    batch = mask_documents(Batch(tokens_BS, tokens_BS), eod_id=END)
    # The end of one row begins nothing in another one.
    assert batch.start_BS is not None
    assert batch.start_BS.tolist() == [[0, 0, 0], [0, 0, 0]]


def by_loop(q_BASD: Tensor, k_BASD: Tensor, v_BASD: Tensor, start_BS: Tensor) -> Tensor:
    factor = q_BASD.shape[1] // k_BASD.shape[1]
    out_BASD = torch.empty_like(q_BASD)
    for b, row in enumerate(start_BS.tolist()):
        for a in range(q_BASD.shape[1]):
            for s, start in enumerate(row):
                seen = slice(start, s + 1)
                score = k_BASD[b, a // factor, seen] @ q_BASD[b, a, s] / q_BASD.shape[-1] ** 0.5
                out_BASD[b, a, s] = score.softmax(0) @ v_BASD[b, a // factor, seen]
    return out_BASD


def attention_inputs(*, grad: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(2, 4, S, 16), (2, 2, S, 16), (2, 2, S, 16)]
    return [torch.randn(shape, generator=generator, requires_grad=grad) for shape in shapes]


def test_attention_is_what_a_loop_computes(packed: Batch) -> None:
    inputs = attention_inputs(grad=True)
    assert packed.start_BS is not None
    want, got = by_loop(*inputs, packed.start_BS), attend(*inputs, dense_mask(packed.start_BS))
    torch.testing.assert_close(got, want)
    dy = torch.randn(want.shape, generator=torch.Generator().manual_seed(3))
    for one, other in zip(
        torch.autograd.grad(got, inputs, dy), torch.autograd.grad(want, inputs, dy), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_what_a_loop_computes(packed: Batch) -> None:
    """What CUDA runs compiled. On a CPU torch has no backward of it."""
    inputs = attention_inputs(grad=False)
    assert packed.start_BS is not None
    got = attend(*inputs, block_mask(packed.start_BS))
    torch.testing.assert_close(got, by_loop(*inputs, packed.start_BS))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [200, 1024])
def test_compiled_flex_attention_and_its_gradients(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, 4, length, 64), (2, 2, length, 64), (2, 2, length, 64), (2, 4, length, 64)]
    drawn = [torch.randn(shape, generator=generator).cuda() for shape in shapes]
    position_S = torch.arange(length, device="cuda")
    start_BS = torch.stack([position_S // 150 * 150, position_S // 77 * 77])

    def results(dtype: torch.dtype, mask: object) -> list[Tensor]:
        *inputs, dy = (x.to(dtype).detach().requires_grad_() for x in drawn)
        y_BASD = attend(*inputs, mask)
        return [y_BASD.detach(), *torch.autograd.grad(y_BASD, inputs, dy.detach())]

    got = results(torch.bfloat16, document_mask(start_BS))
    same = results(torch.bfloat16, dense_mask(start_BS))
    want = results(torch.float32, dense_mask(start_BS))
    for name, *three in zip(("y", "dq", "dk", "dv"), got, same, want, strict=True):
        assert_as_good_as(*three, name)


@pytest.mark.parametrize(("length", "size"), [(512, 2), (384, 2), (600, 3)])
def test_blocks_of_a_part_are_rows_of_the_whole_mask(length: int, size: int) -> None:
    """A block of queries may have both chunks. Blocks that are whole or left out are so in the
    dense mask; what torch asks for in the others is that mask."""
    generator = torch.Generator().manual_seed(length)
    ends_BS = torch.rand((2, length), generator=generator) < torch.tensor([[0.0], [0.02]])
    starts_BS = torch.where(ends_BS, torch.arange(length), 0).cummax(1).values
    whole = dense_mask(starts_BS)
    for rank in range(size):
        part = ContextPart(rank, size)
        own_S = part.positions(length // size)
        dense = dense_mask(starts_BS[:, own_S], part)
        assert torch.equal(dense, whole[:, :, own_S])
        blocks = block_mask(starts_BS[:, own_S], part)
        b, q, k = (torch.arange(n) for n in (2, len(own_S), length))
        assert torch.equal(blocks.mask_mod(b[:, None, None], 0, q[:, None], k), dense[:, 0])
        kinds = blocks.to_dense()[:, 0]
        full = as_blocks(blocks.full_kv_num_blocks, blocks.full_kv_indices)
        for row, i, j in itertools.product(*map(range, kinds.shape)):
            rows = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            block = dense[row, 0][rows]
            assert bool(kinds[row, i, j]) or not block.any()
            assert not full[row, i, j] or block.all()
        assert not kinds.all()
        if length == 512:
            assert full.any()


def as_blocks(number_B1N: Tensor, index_B1NN: Tensor) -> Tensor:
    """[B, N, N] from lists of blocks."""
    there_BNN = torch.arange(index_B1NN.shape[-1]) < number_B1N[:, 0, :, None]
    found = torch.zeros_like(there_BNN)
    return found.scatter(2, index_B1NN[:, 0].long(), there_BNN)


@pytest.mark.parametrize("length", [128, 384, 500])
def test_blocks_are_those_of_torch(length: int) -> None:
    """All lists, as torch finds them by looking at every pair."""
    from torch.nn.attention.flex_attention import create_block_mask

    generator = torch.Generator().manual_seed(length)
    ends_BS = torch.rand((4, length), generator=generator) < torch.tensor(
        [[0.0], [0.004], [0.02], [0.5]]
    )
    starts_BS = torch.where(ends_BS, torch.arange(length), 0).cummax(1).values

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (starts_BS[b, q] <= k) & (k <= q)

    want = create_block_mask(visible, 4, None, length, length, device="cpu")
    got = block_mask(starts_BS)
    assert got.seq_lengths == want.seq_lengths
    for kind in ("kv", "full_kv", "q", "full_q"):
        number = getattr(want, f"{kind}_num_blocks")
        assert torch.equal(getattr(got, f"{kind}_num_blocks"), number)
        there = torch.arange(number.shape[-1]) < number[..., None]
        lists = [getattr(mask, f"{kind}_indices").where(there, -1) for mask in (got, want)]
        assert torch.equal(*lists), kind


def test_the_mask_of_a_device() -> None:
    assert document_mask(None) is None
    start_BS = torch.zeros((1, S), dtype=torch.int64)
    assert torch.equal(document_mask(start_BS), torch.ones(1, 1, S, S, dtype=torch.bool).tril())


def build(config: Config, rank: int = 0, ep: int = 1) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config, ep_group=dist.group.WORLD if ep > 1 else None)
    model.to_empty(device="cpu")
    initialize(model, seed=1, first_expert=rank * config.moe.num_experts // ep)
    return model.train()


def run(model: Transformer, batches: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of all tokens [T, V], and the gradients of the summed loss."""
    logits, loss = [], torch.zeros(())
    for batch in batches:
        logits.append(model(batch.tokens_BS, None, batch.start_BS).detach().flatten(0, 1))
        loss = loss + model(batch.tokens_BS, batch.labels_BS, batch.start_BS).token_loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return torch.cat(logits), gradients


@pytest.fixture(scope="module")
def alone(packed: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    return run(build(CONFIG), documents(packed))


def assert_same(
    got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]]
) -> None:
    torch.testing.assert_close(got[0], want[0])
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        # A sum over tokens: to fp32's relative error of its largest element.
        error = (got[1][name] - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-5, name


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_packed_is_as_alone(
    packed: Batch, alone: tuple[Tensor, dict[str, Tensor]], recompute: str
) -> None:
    train = replace(CONFIG.train, activation_checkpoint=recompute)
    assert_same(run(build(replace(CONFIG, train=train)), [packed]), alone)
    unmasked = run(build(CONFIG), [replace(packed, start_BS=None)])
    assert not torch.allclose(unmasked[0], alone[0], atol=1e-2)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_packed_is_as_alone_on_two_ranks_that_share_experts(
    packed: Batch, alone: tuple[Tensor, dict[str, Tensor]], recompute: str
) -> None:
    train = replace(CONFIG.train, activation_checkpoint=recompute)

    def on_rank(rank: int) -> tuple[Tensor, dict[str, Tensor]]:
        assert packed.start_BS is not None
        row = slice(rank, rank + 1)
        own = Batch(packed.tokens_BS[row], packed.labels_BS[row], packed.start_BS[row])
        return run(build(replace(CONFIG, train=train), rank, ep=2), [own])

    (logits_0, gradients_0), (logits_1, gradients_1) = run_ranks(on_rank, 2)
    gradients = {
        name: torch.cat([gradient, gradients_1[name]])
        if gradient.shape != alone[1][name].shape
        else gradient + gradients_1[name]
        for name, gradient in gradients_0.items()
    }
    assert_same((torch.cat([logits_0, logits_1]), gradients), alone)


def test_a_document_does_not_see_another_one(packed: Batch) -> None:
    model = build(CONFIG)
    changed = packed.tokens_BS.clone()
    changed[0, 2] = changed[0, 2] % (V - 1) + 1
    before = model(packed.tokens_BS, None, packed.start_BS)
    after = model(changed, None, packed.start_BS)
    assert not torch.allclose(before[0, 2:5], after[0, 2:5], atol=1e-2)
    torch.testing.assert_close(before[0, 5:], after[0, 5:])
    unmasked = [model(tokens, None, None)[0, 5:] for tokens in (packed.tokens_BS, changed)]
    assert not torch.allclose(*unmasked, atol=1e-2)
