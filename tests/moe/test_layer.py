"""The expert-parallel layer on P ranks against the reference on the concatenated tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layer_runs import CASES, CONFIG, TILE, by_reference, inputs, run_layer, together
from ranks import run_ranks

from distmoe.config import DispatchConfig, RoundingConfig
from distmoe.kernels.testing import assert_as_good_as, poisoned_empty
from distmoe.moe.schedule import ORDERS


@pytest.mark.parametrize("rule", ["none", "nearest", "balance"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_forward_and_gradients(num_ranks: int, case: str, rule: str) -> None:
    make_tokens, favourite = CASES[case]
    tokens = make_tokens(num_ranks)
    x, dout = inputs(tokens, favourite)
    config = replace(CONFIG, rounding=RoundingConfig(rule, tile=TILE))
    with poisoned_empty():
        results = run_ranks(run_layer, num_ranks, config, tokens, x, dout)
    exact, routing = by_reference(config, x, dout, num_ranks, torch.float64)
    same_dtype, _ = by_reference(config, x, dout, num_ranks, torch.float32)
    joined = together(results)
    for name, want in exact.items():
        assert_as_good_as(joined[name], same_dtype[name], want.float(), name)
    for result in results:
        assert torch.equal(result["target"], routing.counts_E.long())
    if rule != "none":
        assert (routing.counts_E % TILE == 0).all()


SCHEDULES = [
    (num_ranks, level, order, steps)
    for level in ("copies", "rank")
    for order in ORDERS
    for num_ranks, steps in [(2, 3), (4, 1), (4, 3), (4, 7)]
]
# Of six experts.
SCHEDULES += [(3, "rank", "tokens", 2), (6, "rank", "source", 5)]


@pytest.mark.parametrize(
    ("case", "rule"),
    [("uneven", "balance"), ("a_rank_without_tokens", "none"), ("all_to_one_expert", "balance")],
)
@pytest.mark.parametrize(("num_ranks", "level", "order", "steps"), SCHEDULES)
def test_every_schedule(
    num_ranks: int, level: str, order: str, steps: int, case: str, rule: str
) -> None:
    """The same layer however its rows travel; twice the same bits, with and without overlap."""
    make_tokens, favourite = CASES[case]
    tokens = make_tokens(num_ranks)
    x, dout = inputs(tokens, favourite)
    dispatch = DispatchConfig(level=level, order=order, steps=steps)
    num_experts = CONFIG.num_experts if CONFIG.num_experts % num_ranks == 0 else 6
    config = replace(CONFIG, num_experts=num_experts)
    config = replace(config, rounding=RoundingConfig(rule, tile=TILE), dispatch=dispatch)
    serial = replace(config, dispatch=replace(dispatch, overlap=False))
    with poisoned_empty():
        joined = together(run_ranks(run_layer, num_ranks, config, tokens, x, dout))
        again = together(run_ranks(run_layer, num_ranks, serial, tokens, x, dout))
    exact, _ = by_reference(config, x, dout, num_ranks, torch.float64)
    same_dtype, _ = by_reference(config, x, dout, num_ranks, torch.float32)
    for name, want in exact.items():
        assert_as_good_as(joined[name], same_dtype[name], want.float(), name)
        assert torch.equal(joined[name], again[name]), name


@pytest.mark.parametrize(
    ("case", "rule"),
    [
        ("uneven", "balance"),
        ("a_rank_without_tokens", "none"),
        ("all_to_one_expert", "balance"),
        ("one_rank_starved", "none"),
    ],
)
@pytest.mark.parametrize(
    ("num_ranks", "ranks_per_node", "steps"),
    [(4, 2, 1), (4, 2, 3), (4, 2, 7), (8, 2, 3), (8, 4, 2)],
)
def test_over_nodes(num_ranks: int, ranks_per_node: int, steps: int, case: str, rule: str) -> None:
    """A row a node and token, passed on inside; twice the same bits, with and without overlap."""
    make_tokens, favourite = CASES[case]
    tokens = make_tokens(num_ranks)
    x, dout = inputs(tokens, favourite)
    dispatch = DispatchConfig(level="node", steps=steps)
    config = replace(CONFIG, rounding=RoundingConfig(rule, tile=TILE), dispatch=dispatch)
    serial = replace(config, dispatch=replace(dispatch, overlap=False))
    with poisoned_empty():
        joined, again = (
            together(run_ranks(run_layer, num_ranks, c, tokens, x, dout, ranks_per_node))
            for c in (config, serial)
        )
    exact, _ = by_reference(config, x, dout, num_ranks, torch.float64)
    same_dtype, _ = by_reference(config, x, dout, num_ranks, torch.float32)
    for name, want in exact.items():
        assert_as_good_as(joined[name], same_dtype[name], want.float(), name)
        assert torch.equal(joined[name], again[name]), name


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_overlap_changes_no_bit(num_ranks: int) -> None:
    x, dout = inputs([24] * num_ranks, None)
    config = replace(CONFIG, rounding=RoundingConfig("balance", tile=TILE))
    serial = replace(config, dispatch=DispatchConfig(overlap=False))
    first = together(run_ranks(run_layer, num_ranks, config, [24] * num_ranks, x, dout))
    second = together(run_ranks(run_layer, num_ranks, serial, [24] * num_ranks, x, dout))
    for name in first:
        assert torch.equal(first[name], second[name]), name
