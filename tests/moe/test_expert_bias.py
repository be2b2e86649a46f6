"""The bias of the experts: integers, the same for every number of ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distmoe import MoE, MoEConfig, update_expert_bias
from distmoe.config import RoundingConfig
from distmoe.kernels.router_topk import BIAS_LIMIT
from distmoe.moe.expert_bias import moved
from distmoe.moe.routing_tape import RoutingTape
from distmoe.registry import ROUTERS
from distmoe.routing.rounding.reference import top_k_reference
from distmoe.routing.routers import Scores, is_forced, make_router

H, E, K, STEPS, MICRO, TOKENS = 16, 8, 2, 5, 2, 24
RATE = 0.01
CONFIG = MoEConfig(
    hidden_size=H,
    intermediate_size=4,
    num_experts=E,
    top_k=K,
    router="sigmoid_topk",
    bias_update_rate=RATE,
    # Counts are those of top-k, so rounding must not show.
    rounding=RoundingConfig("balance", tile=4),
)
LAYERS = 2
ROUTERS_LEH = torch.randn(LAYERS, E, H, generator=torch.Generator().manual_seed(0))


def inputs(seed: int = 1) -> Tensor:
    """[step, micro-batch, token, H], with a mean, so that some experts are liked by many."""
    shape = (STEPS, MICRO, TOKENS, H)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.4


def make_layers(config: MoEConfig = CONFIG) -> list[MoE]:
    group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    layers = [MoE(config, group) for _ in range(LAYERS)]
    with torch.no_grad():
        for layer, router_EH in zip(layers, ROUTERS_LEH, strict=True):
            layer.router_EH.copy_(router_EH)
    return layers


def biases_after_each_step(rank: int, num_ranks: int, router: str) -> list[list[list[int]]]:
    layers = make_layers(replace(CONFIG, router=router))
    own = slice(rank * TOKENS // num_ranks, (rank + 1) * TOKENS // num_ranks)
    found = []
    for x in inputs():
        for x_TH in x:
            for layer in layers:
                layer(x_TH[own])
        update_expert_bias(layers)
        found.append([layer.bias_E.tolist() for layer in layers if layer.bias_E is not None])
    return found


def by_loops(router: str) -> list[list[list[int]]]:
    """The same with Python's integers, all tokens in one place."""
    route = make_router(router, top_k=K, renormalize="topk")
    bias_LE = [[0] * E for _ in range(LAYERS)]
    found = []
    for x in inputs():
        for bias_E, router_EH in zip(bias_LE, ROUTERS_LEH, strict=True):
            logits_TE = (x.view(-1, H).double() @ router_EH.double().T).float()
            key_TE = route(logits_TE).key_TE + torch.tensor(bias_E)
            freq_E = top_k_reference(key_TE, K).sum(0).tolist()
            for e, freq in enumerate(freq_E):
                mean = sum(freq_E) / E
                bias_E[e] += round(RATE * 2**24) * ((freq < mean) - (freq > mean))
        found.append([list(bias_E) for bias_E in bias_LE])
    return found


@pytest.mark.parametrize("router", [name for name in ROUTERS if not is_forced(name)])
def test_every_number_of_ranks_has_the_biases_by_loops(router: str) -> None:
    want = by_loops(router)
    assert any(any(bias_E) for bias_E in want[0])
    for num_ranks in (1, 2, 4):
        for result in run_ranks(biases_after_each_step, num_ranks, num_ranks, router):
            assert result == want


def test_one_all_reduce_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(rank: int) -> None:
        layers = make_layers(replace(CONFIG, load_balance_scope="rank"))
        for layer in layers:
            layer(inputs()[0, 0])
        # The other rank may be ahead; this one's forwards have sent nothing.
        assert rank not in [caller for caller, _ in calls]
        update_expert_bias(layers)
        update_expert_bias([])

    calls: list[tuple[int, int]] = []
    real = dist.all_reduce

    def counted(tensor: Tensor, *args: object, **options: object) -> object:
        calls.append((dist.get_rank(), tensor.numel()))
        return real(tensor, *args, **options)

    monkeypatch.setattr(dist, "all_reduce", counted)
    run_ranks(run, 2)
    assert sorted(calls) == [(0, LAYERS * E), (1, LAYERS * E)]


def test_the_bias_evens_out_skewed_logits() -> None:
    (layer, _) = make_layers(replace(CONFIG, bias_update_rate=0.005))
    generator = torch.Generator().manual_seed(3)

    def imbalance() -> float:
        layer(torch.randn(256, H, generator=generator) + 1.5)
        return float(layer.stats.freq_E.max() / layer.stats.freq_E.double().mean())

    first = imbalance()
    for _ in range(150):
        update_expert_bias([layer])
        last = imbalance()
    assert first > 2.5
    assert last < 1.5


def test_evaluation_is_not_counted() -> None:
    layers = make_layers()
    for layer in layers:
        layer.eval()(inputs()[0, 0])
    update_expert_bias(layers)
    assert all(not layer.bias_E.any() for layer in layers)
    for layer in layers:
        layer.train()(inputs()[0, 0])
        layer.eval()(inputs()[1, 0])
        assert layer.step_counts.take().tolist()[-1] == TOKENS


@pytest.mark.parametrize("with_tape", [True, False])
def test_a_recomputed_forward_is_not_counted(with_tape: bool) -> None:
    layer = make_layers()[0]
    context = {"context_fn": RoutingTape.contexts} if with_tape else {}
    noted: list[Scores] = []
    layer.on_scores = noted.append
    layer.begin_step()
    for x in inputs()[0]:
        out, _ = checkpoint(layer, x.requires_grad_(), use_reentrant=False, **context)
        out.sum().backward()
    assert layer.step_counts.take().tolist()[-1] == MICRO * TOKENS
    assert len(noted) == MICRO


def test_counts_are_of_top_k_and_taken_once() -> None:
    layer = make_layers()[0]
    layer(inputs()[0, 0])
    assert not torch.equal(layer.stats.freq_E, layer.stats.target_E)
    freq_E = layer.stats.freq_E
    assert layer.step_counts.take()[:-1].tolist() == freq_E.tolist()
    update_expert_bias([layer])
    assert not layer.bias_E.any()


def test_begin_step_forgets_what_a_skipped_step_counted() -> None:
    layer = make_layers()[0]
    layer(inputs()[0, 0])
    layer.begin_step()
    update_expert_bias([layer])
    assert not layer.bias_E.any()


def test_moved_compares_with_the_mean_exactly_and_stops_at_the_limit() -> None:
    freq_E = torch.tensor([3, 2, 2, 2])
    start_E = torch.zeros(4, dtype=torch.int32)
    assert moved(start_E, freq_E, by=5).tolist() == [-5, 5, 5, 5]
    assert moved(start_E, torch.full((4,), 7), by=5).tolist() == [0, 0, 0, 0]
    # Counts whose difference a float would lose.
    large_E = torch.tensor([2**55, 2**55 + 1, 2**55 - 1, 2**55])
    assert moved(start_E, large_E, by=5).tolist() == [0, -5, 5, 0]
    edge_E = torch.tensor([-BIAS_LIMIT + 2, BIAS_LIMIT - 2, 0, 0], dtype=torch.int32)
    found = moved(edge_E, freq_E, by=5)
    assert found.tolist() == [-BIAS_LIMIT, BIAS_LIMIT, 5, 5]
    assert found.dtype == torch.int32


def test_a_rate_can_be_given() -> None:
    layer = make_layers()[0]
    layer(inputs()[0, 0])
    update_expert_bias([layer], 0.5)
    assert set(layer.bias_E.abs().tolist()) <= {0, 2**23}
    assert layer.bias_E.any()
    with pytest.raises(ValueError, match=r"rate is 2; it must be in \[0, 1\]"):
        update_expert_bias([layer], 2)


def test_layers_without_a_bias_and_of_other_sizes() -> None:
    plain = MoE(replace(CONFIG, bias_update_rate=0.0))
    small = MoE(replace(CONFIG, num_experts=4))
    unused = MoE(CONFIG)
    layers = [plain, small, make_layers()[0], unused]
    for layer in layers[:3]:
        layer(inputs()[0, 0])
    update_expert_bias(layers)
    assert plain.bias_E is None
    assert "bias_E" not in plain.state_dict()
    assert (len(small.bias_E), bool(small.bias_E.any())) == (4, True)
    assert not unused.bias_E.any()
    update_expert_bias([plain])


def test_the_bias_is_an_int_wherever_the_layer_goes() -> None:
    with torch.device("meta"):
        layer = MoE(CONFIG)
    layer.to_empty(device="cpu")
    layer.bias_E.fill_(77)
    layer.reset_parameters()
    assert layer.bias_E.tolist() == [0] * E
    layer.bias_E.copy_(torch.arange(E) + 2**23)
    layer.bfloat16()
    assert layer.bias_E.dtype == torch.int32
    assert layer.state_dict()["bias_E"].tolist() == list(range(2**23, 2**23 + E))
    assert layer(inputs()[0, 0].bfloat16())[0].dtype == torch.bfloat16
