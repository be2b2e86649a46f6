"""The expert-parallel layer on P ranks against the reference on the concatenated tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from distmoe import MoE, MoEConfig
from distmoe.config import DispatchConfig, RoundingConfig
from distmoe.kernels.testing import assert_as_good_as, poisoned_empty
from distmoe.moe.reference import moe_reference
from distmoe.moe.schedule import ORDERS
from distmoe.routing.routers import scores_from_probabilities
from distmoe.routing.routing import Routing

H, I, E, K = 16, 8, 8, 3
CONFIG = MoEConfig(hidden_size=H, intermediate_size=I, num_experts=E, top_k=K)
TILE = 8

# Tokens of each rank, and what the router prefers.
CASES = {
    "even": (lambda P: [48 // P] * P, None),
    "uneven": (lambda P: [48 // P + 3 * r for r in range(P)], None),
    "a_rank_without_tokens": (lambda P: [0] + [24] * (P - 1) if P > 1 else [24], None),
    "all_to_one_expert": (lambda P: [40 // P] * P, 5),
    "one_rank_starved": (lambda P: [24] * P, 0),
}


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "router": torch.randn(E, H, generator=generator),
        "w_in": torch.randn(E, 2 * I, H, generator=generator) * H**-0.5,
        "w_out": torch.randn(E, H, I, generator=generator) * I**-0.5,
    }


def inputs(tokens: list[int], favourite: int | None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(tokens))
    x = torch.randn(sum(tokens), H, generator=generator)
    if favourite is not None:
        # Along one router row: every token likes that expert, and the same few others.
        x = x * 0.05 + weights()["router"][favourite] * 0.5
    return x, torch.randn(sum(tokens), H, generator=generator)


def run_layer(
    rank: int,
    config: MoEConfig,
    tokens: list[int],
    x: Tensor,
    dout: Tensor,
    ranks_per_node: int = 0,
):
    group = dist.group.WORLD if len(tokens) > 1 else None
    layer = MoE(config, group, ranks_per_node=ranks_per_node)
    own = slice(rank * E // len(tokens), (rank + 1) * E // len(tokens))
    w = weights()
    with torch.no_grad():
        layer.router_EH.copy_(w["router"])
        layer.experts.w_in_eGH.copy_(w["w_in"][own])
        layer.experts.w_out_eHI.copy_(w["w_out"][own])
    begin = sum(tokens[:rank])
    rows = slice(begin, begin + tokens[rank])
    x_TH = x[rows].clone().requires_grad_()
    out_TH, losses = layer(x_TH)
    objective = (out_TH * dout[rows]).sum() + losses.load_balance + losses.z
    objective.backward()
    return {
        "out": out_TH.detach(),
        "dx": x_TH.grad,
        "d_router": layer.router_EH.grad,
        "dw_in": layer.experts.w_in_eGH.grad,
        "dw_out": layer.experts.w_out_eHI.grad,
        "loss": torch.stack([losses.load_balance, losses.z]).detach(),
        "target": layer.stats.target_E,
        "rows_sent": layer.stats.rows_sent,
        "copies_sent": layer.stats.copies_sent,
        "traffic": layer.exchange.traffic.bytes_sent,
        "links": [e.traffic.bytes_sent for e in layer.links.all()] if layer.links else [],
    }


def together(results: list[dict]) -> dict[str, Tensor]:
    """What the ranks give together: rows one after the other, shared gradients summed."""
    joined = {
        name: torch.cat([r[name] for r in results]) for name in ("out", "dx", "dw_in", "dw_out")
    }
    joined |= {
        name: torch.stack([r[name] for r in results]).sum(0) for name in ("d_router", "loss")
    }
    return joined


def by_reference(config: MoEConfig, x: Tensor, dout: Tensor, groups: int, dtype: torch.dtype):
    """The same layer as plain autograd over all tokens and experts."""
    from distmoe.routing.losses import load_balance_loss, z_loss
    from distmoe.routing.round_tokens import round_tokens

    w = {name: value.to(dtype).requires_grad_() for name, value in weights().items()}
    x_TH = x.to(dtype).clone().requires_grad_()
    logits_TE = x_TH @ w["router"].T
    prob_TE = logits_TE.softmax(1)
    rounded = round_tokens(
        prob_TE.detach().float(),
        K,
        tile=config.rounding.tile,
        rule=config.rounding.rule,
        balance_groups=groups,
    )
    scores = scores_from_probabilities(prob_TE, top_k=K, renormalize="topk")
    mask_TE = torch.zeros_like(prob_TE, dtype=torch.bool)
    mask_TE[rounded.token_N.long(), rounded.expert_N.long()] = True
    routing = Routing.from_mask(mask_TE, scores.weight(mask_TE))
    out_TH = moe_reference(x_TH, routing, w["w_in"], w["w_out"])
    counts_E = scores.chosen_TE.sum(0)
    losses = [
        load_balance_loss(prob_TE, counts_E, freq_tokens=len(x), num_tokens=len(x), top_k=K),
        z_loss(logits_TE, num_tokens=len(x)),
    ]
    ((out_TH * dout.to(dtype)).sum() + losses[0] + losses[1]).backward()
    return {
        "out": out_TH.detach(),
        "dx": x_TH.grad,
        "d_router": w["router"].grad,
        "dw_in": w["w_in"].grad,
        "dw_out": w["w_out"].grad,
        "loss": torch.stack(losses).detach(),
    }, rounded


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("rule", ["none", "nearest", "balance"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_forward_and_gradients(num_ranks: int, case: str, rule: str, overlap: bool) -> None:
    make_tokens, favourite = CASES[case]
    tokens = make_tokens(num_ranks)
    x, dout = inputs(tokens, favourite)
    config = replace(
        CONFIG,
        rounding=RoundingConfig(rule, tile=TILE),
        dispatch=DispatchConfig(overlap=overlap),
    )
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
    for num_ranks, steps in [(2, 3), (4, 1), (4, 2), (4, 3), (4, 7)]
]


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
    config = replace(CONFIG, rounding=RoundingConfig(rule, tile=TILE), dispatch=dispatch)
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
    [(4, 2, 1), (4, 2, 2), (4, 2, 3), (4, 2, 7), (8, 2, 1), (8, 2, 3), (8, 4, 2)],
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


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_overlap_changes_no_bit(num_ranks: int) -> None:
    x, dout = inputs([24] * num_ranks, None)
    config = replace(CONFIG, rounding=RoundingConfig("balance", tile=TILE))
    serial = replace(config, dispatch=DispatchConfig(overlap=False))
    first = together(run_ranks(run_layer, num_ranks, config, [24] * num_ranks, x, dout))
    second = together(run_ranks(run_layer, num_ranks, serial, [24] * num_ranks, x, dout))
    for name in first:
        assert torch.equal(first[name], second[name]), name


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
        from distmoe.comm import make_exchange
        from distmoe.moe.dispatch import plan_dispatch
        from distmoe.routing import round_tokens

        own = scores[rank * count : (rank + 1) * count]
        exchange = make_exchange(dist.group.WORLD)
        return plan_dispatch(round_tokens(own, K, rule="none"), exchange, tile=1).rows_sent()

    hit = 1 - math.comb(E - E // num_ranks, K) / math.comb(E, K)
    expected = count * num_ranks * hit * (num_ranks - 1)
    assert sum(run_ranks(rows_sent, num_ranks)) == pytest.approx(expected, rel=0.02)


def test_evaluation_is_plain_top_k() -> None:
    layer = MoE(replace(CONFIG, rounding=RoundingConfig("nearest", tile=TILE)))
    x = torch.randn(40, H, generator=torch.Generator().manual_seed(3))
    layer.train()(x)
    assert int(layer.stats.dropped + layer.stats.added) > 0
    layer.eval()(x)
    assert int(layer.stats.dropped + layer.stats.added) == 0
    assert torch.equal(layer.stats.freq_E, layer.stats.target_E)


def test_any_shape_and_a_shared_expert() -> None:
    layer = MoE(replace(CONFIG, shared_intermediate_size=12, rounding=RoundingConfig("none")))
    x = torch.randn(2, 5, H, generator=torch.Generator().manual_seed(4))
    out, losses = layer(x)
    assert out.shape == x.shape
    assert torch.equal(out.view(-1, H), layer(x.view(-1, H))[0])
    without = layer.experts.w_out_eHI.data.zero_()
    assert torch.equal(layer(x)[0], layer.shared(x.view(-1, H)).view(x.shape)), without.shape
    assert losses.load_balance.ndim == 0


def test_impossible_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"top_k is 9; it must be in 1\.\.num_experts \(8\)"):
        MoE(replace(CONFIG, top_k=9))
    with pytest.raises(ValueError, match="renormalize is 'none'"):
        MoE(replace(CONFIG, router="topk_softmax", renormalize="none"))


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_scale": 0.0}, "score_scale is 0.0; it must be greater than 0"),
        ({"bias_update_rate": -0.1}, r"bias_update_rate is -0.1; it must be in \[0, 1\]"),
        ({"bias_update_rate": 1e-9}, "bias_update_rate is 1e-09; it must be 0 or at least 5.96"),
        ({"load_balance_scope": "node"}, "load_balance_scope is 'node'; it must be one of global,"),
        ({"group_score": "mean"}, "group_score is 'mean'; it must be one of max, top2, sum"),
        ({"expert_groups": 3}, "moe.expert_groups is 3; it must be 0, 1 or divide"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
    ],
)
def test_impossible_settings_are_refused_without_a_config_file(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MoE(replace(CONFIG, **changes))


def test_nodes_of_the_ep_group_limit_the_choice() -> None:
    config = replace(CONFIG, nodes_per_token=1, top_k=2, rounding=RoundingConfig("none"))

    def run(rank: int, ranks_per_node: int) -> Tensor:
        layer = MoE(config, dist.group.WORLD, ranks_per_node=ranks_per_node)
        with torch.no_grad():
            layer.router_EH.copy_(weights()["router"])
        layer(x[rank * 20 : (rank + 1) * 20])
        logits_TE = x[rank * 20 : (rank + 1) * 20] @ weights()["router"].T
        return layer._score(logits_TE).chosen_TE

    x = torch.randn(80, H, generator=torch.Generator().manual_seed(5))
    limited_TE = torch.cat(run_ranks(run, 4, 2))
    # Two nodes of two ranks, four experts each.
    assert int(limited_TE.view(80, 2, 4).any(2).sum(1).max()) == 1
    assert limited_TE.sum(1).tolist() == [2] * 80
    free_TE = torch.cat(run_ranks(run, 4, 4))
    assert int(free_TE.view(80, 2, 4).any(2).sum(1).max()) == 2
    with pytest.raises(RuntimeError, match="ranks_per_node is 0; it must be at least 1"):
        run_ranks(run, 4, 0)


def test_scale_multiplies_what_the_experts_give() -> None:
    torch.manual_seed(0)
    layer = MoE(replace(CONFIG, rounding=RoundingConfig("none")))
    x = torch.randn(10, H)
    plain = layer(x)[0]
    layer.config = replace(layer.config, score_scale=2.0)
    assert torch.equal(layer(x)[0], 2 * plain)
