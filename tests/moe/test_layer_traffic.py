"""What an expert-parallel layer sends, counted by its exchanges."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from layer_runs import CONFIG, TILE, E, H, K, by_reference, inputs, run_layer
from ranks import run_ranks

from distmoe import MoE
from distmoe.comm import make_exchange
from distmoe.config import RoundingConfig
from distmoe.moe.dispatch import plan_dispatch
from distmoe.routing import round_tokens
from distmoe.routing.routing import Routing


def crossings(routing: Routing, tokens: int, num_ranks: int, ranks_per_node: int) -> dict[str, int]:
    """Rows that leave their rank, one direction, counted pair by pair: over nodes and inside."""
    pairs = zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True)
    rail, fan, near = set(), set(), set()
    for token, expert in pairs:
        source, target = token // tokens, expert // (E // num_ranks)
        source_node, node = source // ranks_per_node, target // ranks_per_node
        relay = node * ranks_per_node + source % ranks_per_node
        if source_node == node:
            near |= {(token, target)} if source != target else set()
        else:
            rail.add((token, node))
            fan |= {(token, target)} if target != relay else set()
    return {"rail": len(rail), "fan": len(fan), "near": len(near)}


@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(4, 2), (8, 4)])
def test_a_row_crosses_to_a_node_once(num_ranks: int, ranks_per_node: int) -> None:
    """Bytes of every link: along the rail a row a node and token, there and back, forward and
    backward; inside the node what is passed on, and a byte a rank for what is."""
    tokens = [24] * num_ranks
    x, dout = inputs(tokens, None)
    config = replace(CONFIG, rounding=RoundingConfig("balance", tile=TILE))
    results = run_ranks(run_layer, num_ranks, config, tokens, x, dout, ranks_per_node)
    _, routing = by_reference(config, x, dout, num_ranks, torch.float32)
    want = crossings(routing, 24, num_ranks, ranks_per_node)
    assert want["rail"] < want["fan"] + want["rail"]

    def sent(place: int, kind: str) -> int:
        return sum(r["links"][place].get(kind, 0) for r in results)

    row = 4 * H * 4
    assert sent(0, "rows") == want["rail"] * row
    assert sent(0, "needs") == want["rail"] * ranks_per_node
    assert sent(1, "rows") + sent(2, "rows") == want["fan"] * row
    assert sum(r["traffic"]["rows"] for r in results) == want["near"] * row
    # Rows along the rail and to near ranks are what a rank sends itself.
    assert sum(r["rows_sent"] for r in results) == want["rail"] + want["near"]


@pytest.mark.parametrize("rule", ["none", "balance"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_row_crosses_once(num_ranks: int, rule: str) -> None:
    """Bytes counted by the exchange: each token once per other rank that has one of its experts,
    there and back, in forward and backward; ids and scores as 8 bytes a pair, under a head of 8
    bytes where there are any, dscore as 4."""
    tokens = [24] * num_ranks
    x, dout = inputs(tokens, None)
    config = replace(CONFIG, rounding=RoundingConfig(rule, tile=TILE))
    results = run_ranks(run_layer, num_ranks, config, tokens, x, dout)
    _, routing = by_reference(config, x, dout, num_ranks, torch.float32)
    owner_N, token_N = routing.expert_N // (E // num_ranks), routing.token_N
    crossing = owner_N != token_N // 24
    pairs = int(crossing.sum())
    unique = len(set(zip(owner_N[crossing].tolist(), token_N[crossing].tolist(), strict=True)))
    assert sum(r["rows_sent"] for r in results) == unique
    assert sum(r["copies_sent"] for r in results) == pairs
    assert unique < pairs
    sent = {kind: sum(r["traffic"][kind] for r in results) for kind in results[0]["traffic"]}
    assert sent["rows"] == 4 * unique * H * 4
    owners = torch.stack([token_N // 24, owner_N], dim=1)[crossing].unique(dim=0)
    assert sent["pairs"] == (pairs + len(owners)) * 8
    assert sent["scores"] == pairs * 4


def test_expected_rows_under_uniform_routing() -> None:
    """D(P)(P-1)/P rows per token with D(g) = g(1 - C(E-E/g,K)/C(E,K)), to sampling error."""
    num_ranks, count = 4, 2048
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(count * num_ranks, E, generator=generator)

    def rows_sent(rank: int) -> int:
        own = scores[rank * count : (rank + 1) * count]
        exchange = make_exchange(dist.group.WORLD)
        return plan_dispatch(round_tokens(own, K, rule="none"), exchange, tile=1).rows_sent()

    hit = 1 - math.comb(E - E // num_ranks, K) / math.comb(E, K)
    expected = count * num_ranks * hit * (num_ranks - 1)
    assert sum(run_ranks(rows_sent, num_ranks)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("rounding", "small"),
    [
        (RoundingConfig("none"), {"counts": 1}),
        (RoundingConfig("balance", selection="quota"), {"counts": 1}),
        (RoundingConfig("balance"), {"counts": 1, "candidates": 1}),
        (
            RoundingConfig("balance", transport="owner"),
            {"counts": 1, "candidates": 1, "accepted": 1},
        ),
        (RoundingConfig("score"), {"counts": 1, "key sums": 2, "candidates": 1}),
        (RoundingConfig("balance", scope="rank"), {"counts": 2}),
        (
            RoundingConfig("balance", capacity_factor=1.5),
            {"counts": 1, "key counts": 3, "key ties": 1, "candidates": 1},
        ),
        (RoundingConfig(selection="quota", capacity_factor=1.5), {"counts": 1}),
        (RoundingConfig("none", scope="rank", capacity_factor=1.5), {"counts": 2}),
    ],
    ids=str,
)
def test_rounds_of_a_layer(rounding: RoundingConfig, small: dict[str, int]) -> None:
    """Sizes of what arrives need no message of their own: the counts of top-k and the selection
    tell the pairs, and those bring their number of rows."""
    num_ranks = 2
    x, dout = inputs([24] * num_ranks, None)
    config = replace(CONFIG, rounding=replace(rounding, tile=TILE))

    def rounds(rank: int) -> dict[str, int]:
        layer = MoE(config, dist.group.WORLD)
        layer(x[rank * 24 : rank * 24 + 24])
        return layer.exchange.traffic.rounds

    # Rows of the one peer there, and back.
    assert run_ranks(rounds, num_ranks) == [small | {"pairs": 1, "rows": 2}] * num_ranks
