"""A layer whose experts have a capacity: the same on P ranks as on one, and only in training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from layer_runs import (
    CASES,
    CONFIG,
    TILE,
    E,
    by_reference,
    inputs,
    make_layer,
    run_layer,
    together,
    weights,
)
from ranks import run_ranks
from torch import Tensor

from distmoe import MoE, MoEConfig, update_expert_bias
from distmoe.config import RoundingConfig
from distmoe.kernels.testing import assert_as_good_as

TOKENS = 48


def capped(rule: str, factor: float = 1.0, of: str = "expert") -> MoEConfig:
    rounding = RoundingConfig(rule, tile=TILE, capacity_factor=factor, capacity_of=of)
    return replace(CONFIG, rounding=rounding)


@pytest.mark.parametrize(
    ("rule", "of"), [("none", "expert"), ("balance", "expert"), ("nearest", "rank")]
)
@pytest.mark.parametrize("case", ["even", "all_to_one_expert", "a_rank_without_tokens"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_forward_and_gradients(num_ranks: int, case: str, rule: str, of: str) -> None:
    make_tokens, favourite = CASES[case]
    tokens = make_tokens(num_ranks)
    x, dout = inputs(tokens, favourite)
    config = capped(rule, of=of)
    results = run_ranks(run_layer, num_ranks, config, tokens, x, dout)
    exact, routing = by_reference(config, x, dout, num_ranks, torch.float64)
    same_dtype, _ = by_reference(config, x, dout, num_ranks, torch.float32)
    joined = together(results)
    for name, want in exact.items():
        assert_as_good_as(joined[name], same_dtype[name], want.float(), name)
    runs, tile = E if of == "expert" else num_ranks, 1 if rule == "none" else TILE
    most = -(-3 * sum(tokens) // (runs * tile)) * tile
    for result in results:
        assert torch.equal(result["target"], routing.counts_E.long())
        assert int(result["target"].view(runs, -1).sum(1).max()) <= most


@pytest.mark.parametrize("selection", ["exact", "quota"])
def test_training_of_a_few_steps(selection: str) -> None:
    """Weights of experts and router, bias and what was dropped are those of one rank."""
    x, _ = inputs([TOKENS], favourite=5)
    rounding = RoundingConfig("nearest", tile=TILE, capacity_factor=1.0, selection=selection)
    config = replace(CONFIG, rounding=rounding, bias_update_rate=0.01)

    def train(rank: int, num_ranks: int, dtype: torch.dtype) -> dict[str, Tensor]:
        layer = make_layer(config, rank, num_ranks).to(dtype)
        own, dropped = x.to(dtype).chunk(num_ranks)[rank], []
        for _ in range(3):
            layer.begin_step()
            out_TH, losses = layer(own)
            (out_TH.square().sum() + losses.load_balance).backward()
            if num_ranks > 1:
                dist.all_reduce(layer.router_EH.grad)
            dropped.append(layer.stats.dropped)
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None
            update_expert_bias([layer])
        return {
            "experts": layer.experts.w_in_eGH.detach(),
            "router": layer.router_EH.detach(),
            "bias": layer.bias_E,
            "dropped": torch.stack(dropped),
        }

    (alone,) = run_ranks(train, 1, 1, torch.float32)
    assert (alone["dropped"] > 0).all()
    ranks = run_ranks(train, 4, 4, torch.float32)
    assert torch.equal(sum(rank["dropped"] for rank in ranks), alone["dropped"])
    assert torch.equal(ranks[0]["bias"], alone["bias"])
    if selection == "exact":
        (exact,) = run_ranks(train, 1, 1, torch.float64)
        joined = torch.cat([r["experts"] for r in ranks])
        assert_as_good_as(joined, alone["experts"], exact["experts"].float())
        assert_as_good_as(ranks[0]["router"], alone["router"], exact["router"].float())


def test_figures_and_loads_are_of_top_k() -> None:
    """All tokens like the same few experts: what is lost is counted, some tokens lose all, and
    load-balance loss and bias see the load as it was."""
    x, _ = inputs([TOKENS], favourite=5)
    found = {}
    for factor in (0.0, 1.0):
        layer = make_layer(replace(capped("none", factor), bias_update_rate=0.01))
        layer.begin_step()
        _, losses = layer(x)
        found[factor] = layer.stats, losses.load_balance.item(), layer.step_counts.take()
    (free, free_loss, free_counts), (bound, bound_loss, bound_counts) = found.values()
    assert int(free.dropped) == int(free.without_expert) == 0
    assert int(bound.dropped) == int((bound.freq_E - bound.target_E).sum()) > 0
    assert int(bound.without_expert) > 0
    assert int(bound.added) == 0
    assert torch.equal(free.freq_E, bound.freq_E)
    assert free_loss == bound_loss
    assert torch.equal(free_counts, bound_counts)


def test_a_token_without_experts_keeps_the_shared_one() -> None:
    layer = MoE(replace(capped("none"), shared_intermediate_size=12))
    x, _ = inputs([TOKENS], favourite=5)
    with torch.no_grad():
        layer.router_EH.copy_(weights()["router"])
        out_TH, shared_TH = layer(x)[0], layer.shared(x)
    alone_T = (out_TH == shared_TH).all(1)
    assert int(alone_T.sum()) == int(layer.stats.without_expert) > 0


def test_evaluation_has_no_capacity() -> None:
    layer = make_layer(capped("balance"))
    x, _ = inputs([TOKENS], favourite=5)
    layer.eval()(x)
    assert int(layer.stats.dropped) == 0
    plain = make_layer(replace(CONFIG, rounding=RoundingConfig("none")))
    assert torch.equal(layer(x)[0], plain(x)[0])


@pytest.mark.parametrize("renormalize", ["topk", "assigned"])
def test_weights_of_what_is_left(renormalize: str) -> None:
    """`topk` keeps the scale of the pairs that are left, `assigned` has them sum to 1."""
    layer = make_layer(replace(capped("none"), renormalize=renormalize))
    x, _ = inputs([TOKENS], favourite=None)
    scores = layer._score(x @ layer.router_EH.T)
    routing = layer._decide(scores, 1).routing.trimmed()
    sum_T = torch.zeros(TOKENS).index_add_(0, routing.token_N.long(), routing.score_N.detach())
    got_T = routing.token_offsets_T1.diff()
    if renormalize == "assigned":
        one_T = torch.ones(int((got_T > 0).sum()))
        assert_as_good_as(sum_T[got_T > 0], one_T, one_T)
    else:
        one_T = torch.ones(int((got_T == 3).sum()))
        assert_as_good_as(sum_T[got_T == 3], one_T, one_T)
        assert sum_T[got_T < 3].min() < 0.99
