"""The dispatch bench on threaded ranks: peers compute what we do, bytes are counted by pairs."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from distmoe.bench.dispatch import peers
from distmoe.bench.dispatch.check import worst_errors
from distmoe.bench.dispatch.exposed import Exposed, FreeExchange
from distmoe.bench.dispatch.layer import Device, Layer
from distmoe.bench.dispatch.peers import MissingPeerError, load_peer
from distmoe.bench.dispatch.peers.all_to_all import AllToAll
from distmoe.bench.dispatch.report import ExposedLine, hidden_table
from distmoe.bench.dispatch.sleeping_mlp import SleepingExpert
from distmoe.bench.dispatch.subjects import OwnWay, Subject, gradients_of
from distmoe.bench.dispatch.ways import Way
from distmoe.bench.dispatch.wire import counted_bytes, expected_rows, gather_pairs, hops
from distmoe.planner.layer_shape import LayerShape
from distmoe.planner.row_volumes import RankLayout

SHAPE = LayerShape(
    num_tokens=48, hidden=16, intermediate=8, num_experts=8, top_k=3, tile=8, dtype="fp32"
)


def make_layer(*, rule: str = "balance", ranks_per_node: int = 4) -> Layer:
    group = dist.group.WORLD
    assert group is not None
    return Layer(SHAPE, group, ranks_per_node=ranks_per_node, device=Device(), rule=rule)


# With rows of 32 bytes there and home, which have 64 when they are computed.
FP8 = {"row_dtype": "fp8", "sum_dtype": "bf16"}
WAYS = [Way("copies", True), Way("rank", False), Way("node", True), Way("node", True, **FP8)]


@pytest.mark.parametrize("rule", ["none", "balance"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_all_to_all_peer_computes_our_layer(num_ranks: int, rule: str) -> None:
    def errors(rank: int) -> dict[str, float]:
        layer = make_layer(rule=rule, ranks_per_node=num_ranks)
        return worst_errors(layer, load_peer("all_to_all", layer))

    for found in run_ranks(errors, num_ranks):
        assert max(found.values()) < 1e-5, found


class Halved:
    """A peer that is wrong on one rank only."""

    def __init__(self, subject: Subject, rank: int) -> None:
        self.subject, self.rank = subject, rank
        self.leaves = subject.leaves

    def forward(self) -> torch.Tensor:
        return self.subject.forward() * (0.5 if self.rank == 1 else 1.0)

    def contract_gradients(self, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        return self.subject.contract_gradients(gradients)


def test_every_rank_sees_that_a_peer_is_wrong_on_one() -> None:
    def errors(rank: int) -> dict[str, float]:
        layer = make_layer(rule="none", ranks_per_node=2)
        return worst_errors(layer, Halved(load_peer("all_to_all", layer), rank))  # type: ignore[arg-type]

    for found in run_ranks(errors, 2):
        assert found["out"] == pytest.approx(0.5)
        assert found["dx"] > 0.1


def test_a_peer_that_is_not_there_gives_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PEERS, "deepspeed", "distmoe.planner.no_such_package")
    with pytest.raises(MissingPeerError, match="ModuleNotFoundError: .*no_such_package"):
        load_peer("deepspeed", None)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", WAYS)
def test_the_exchange_sends_what_the_routing_asks_for(way: Way) -> None:
    """Bytes of every rank, to the byte: in all, and to other nodes."""
    layout = RankLayout(4, 2)

    def counts(rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        layer = make_layer(ranks_per_node=2)
        subject = OwnWay(layer, way)
        gradients_of(subject, layer.dout_TH)
        sent = subject.row_bytes()
        shape, hop_PP = way.shape(SHAPE), hops(gather_pairs(layer), layout, way.level)
        want = counted_bytes(hop_PP, layout, rank, there=shape.there_bytes, home=shape.home_bytes)
        return (sent.total(), sent["remote"]), want

    for sent, want in run_ranks(counts, 4):
        assert sent == want
        assert 0 < sent[1] < sent[0]


def test_hops_pair_by_pair() -> None:
    """One token of rank 0 with two experts on rank 2 and one on rank 3, two nodes of two."""
    layout = RankLayout(4, 2)
    pairs_PTP = np.zeros((4, 1, 4), dtype=np.int64)
    pairs_PTP[0, 0] = [0, 0, 2, 1]
    found = {
        level: Counter(dict(np.ndenumerate(hops(pairs_PTP, layout, level))))
        for level in ("copies", "rank", "node")
    }
    assert +found["copies"] == {(0, 2): 2, (0, 3): 1}
    assert +found["rank"] == {(0, 2): 1, (0, 3): 1}
    # Rank 2 has the place of rank 0 in its node.
    assert +found["node"] == {(0, 2): 1, (2, 3): 1}
    node = hops(pairs_PTP, layout, "node")
    found = [counted_bytes(node, layout, rank, there=1, home=10) for rank in range(4)]
    # Two passes: rows go there, and come home from those who got them.
    assert found == [(2, 2), (0, 0), (22, 20), (20, 0)]


def test_rows_between_nodes_by_the_formulas() -> None:
    """K = 8, E = 256: rows a token that cost models of others have, too."""
    shape = replace(SHAPE, num_tokens=1, num_experts=256, top_k=8)
    layout = RankLayout(16, 8)
    for level, rows in {"copies": 4.00, "rank": 3.26, "node": 1.00}.items():
        # There and back, forward and backward.
        found = expected_rows(layout, level, shape=shape) / 4
        assert found == pytest.approx(rows, abs=0.005), level


def test_a_free_exchange_needs_no_peer() -> None:
    def free_pass(rank: int) -> tuple[int, float]:
        layer = make_layer(ranks_per_node=2)
        subject = OwnWay(layer, Way("rank", True), exchange=FreeExchange(layer.exchange))
        if rank == 0:
            # Rank 1 takes no part: had anything to travel, this would wait for it.
            out_TH, _ = gradients_of(subject, layer.dout_TH)
            return subject.row_bytes()["node"], float(out_TH.abs().max())
        return 0, 0.0

    (sent, largest), _ = run_ranks(free_pass, 2)
    assert sent > 0
    assert 0 < largest < float("inf")


def test_a_sleeping_device_costs_time_and_no_values() -> None:
    expert = SleepingExpert(pairs_per_s=1000.0)
    x = torch.ones(2, 5, 4, requires_grad=True)
    began = time.perf_counter()
    y = expert(x)
    forward_s = time.perf_counter() - began
    y.sum().backward()
    both_s = time.perf_counter() - began
    assert forward_s >= 0.01
    assert both_s - forward_s >= 0.02
    assert x.grad is not None
    assert not y.any()
    assert not x.grad.any()


def test_exposed_by_the_clock_is_what_free_transfers_save() -> None:
    ranks = [
        Exposed("a", [9.0, 5.0, 6.0], [2.0, 2.0, 8.0], [3.5, 3.0, 0.5]),
        Exposed("a", [9.0, 7.0, 9.0], [4.0, 4.0, 4.0], [2.5, 2.0, 0.5]),
    ]
    assert asdict(ExposedLine.of(Way("rank", True, "tokens", 4), ranks)) == {
        "name": "rank, by tokens, 4 steps",
        "level": "rank",
        "overlap": True,
        "wall_s": 6.0,
        "accounted_s": 2.5,
        "by_clock_s": 3.0,
    }


def test_what_overlap_hides_is_the_difference_to_waiting_at_the_same_level() -> None:
    lines = [
        ExposedLine("copies, waiting", "copies", False, 9.0, 5.0, 5.0),
        ExposedLine("rank, waiting", "rank", False, 6.0, 3.0, 3.0),
        ExposedLine("rank, by source, auto steps", "rank", True, 4.0, 1.5, 1.2),
    ]
    cells = [list(column.cells) for column in hidden_table(lines).columns]
    assert cells == [["rank, by source, auto steps"], ["2000.0"], ["1500.0"], ["0.75"]]


def test_parts_of_the_peer_have_exact_gradients() -> None:
    """An all-to-all there and back is the identity, and so is its gradient."""

    def there_and_back(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        layer = make_layer(ranks_per_node=2)
        peer = load_peer("all_to_all", layer)
        x_LH = torch.randn(len(layer.routing.token_N), 16, requires_grad=True)
        there = AllToAll.apply(x_LH, peer.splits)  # type: ignore[attr-defined]
        y = AllToAll.apply(there, peer.splits.back())  # type: ignore[attr-defined]
        y.backward(2 * x_LH.detach())
        return y.detach() - x_LH.detach(), x_LH.grad - 2 * x_LH.detach()

    for out, gradient in run_ranks(there_and_back, 2):
        assert not out.any()
        assert not gradient.any()
