"""The load of every layer against a plain loop over tokens, on any number of ranks and groups."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor
from torch.overrides import TorchFunctionMode

from distmoe import MoE, MoEConfig
from distmoe.config import (
    Config,
    DispatchConfig,
    ModelConfig,
    ParallelConfig,
    RankInfo,
    RoundingConfig,
)
from distmoe.kernels.fp8_rows import packed_bytes
from distmoe.metrics.flops import flops_per_token
from distmoe.metrics.record import StepRecord
from distmoe.metrics.throughput import Lap
from distmoe.moe.stats import DEVICE_COUNTS, MoEStats
from distmoe.routing.routers import Scores
from distmoe.routing.routing import Routing
from distmoe.runtime import Runtime
from distmoe.train.collect import collect_step, row_bytes
from distmoe.train.communication import StepCommunication
from distmoe.train.step import StepOutcome

H, E, K, M, T = 16, 8, 2, 8, 24
LAYERS, MICRO_BATCHES = 2, 3
CONFIG = Config(
    model=ModelConfig(hidden_size=H, n_layers=LAYERS + 1, n_dense_layers=1, n_heads=2, head_dim=8),
    moe=MoEConfig(
        hidden_size=H,
        intermediate_size=8,
        num_experts=E,
        top_k=K,
        rounding=RoundingConfig("nearest", tile=M),
    ),
)


@dataclass(frozen=True)
class Forward:
    """What one rank chose and ran in one layer and micro-batch."""

    layer: int
    micro_batch: int
    rank: int
    scores: Scores
    routing: Routing


def run_step(
    rank: int, config: Config, router_LEH: Tensor, x_PMLTH: Tensor, monkeypatch: pytest.MonkeyPatch
) -> tuple[StepRecord, list[Forward]]:
    """Forwards of every layer and micro-batch of one rank, and the record of the step."""
    ep, world = config.parallel.ep, dist.get_world_size()
    groups = [dist.new_group(list(range(g, g + ep))) for g in range(0, world, ep)]
    layers = [MoE(config.moe, groups[rank // ep] if ep > 1 else None) for _ in range(LAYERS)]
    forwards: list[Forward] = []
    stats: list[list[MoEStats]] = []
    for micro_batch in range(MICRO_BATCHES):
        for row, layer in enumerate(layers):
            scored: list[Scores] = []
            layer.on_scores = scored.append
            with torch.no_grad():
                layer.router_EH.copy_(router_LEH[row])
            decisions = []
            decide = layer._decide

            def keep(scores: Scores, num_sequences: int, decide=decide, decisions=decisions):
                decisions.append(decide(scores, num_sequences))
                return decisions[-1]

            monkeypatch.setattr(layer, "_decide", keep)
            layer(x_PMLTH[rank, micro_batch, row])
            monkeypatch.setattr(layer, "_decide", decide)
            routing = decisions[0].routing.trimmed()
            forwards.append(Forward(row, micro_batch, rank, scored[0], routing))
        stats.append([layer.stats for layer in layers])
    outcome = StepOutcome(2.0, 1.0, 1.0, 0.5, False, 100, rank + 1.5, stats)
    monkeypatch.setattr(
        "distmoe.train.collect.peak_memory_gib", lambda device: 8.0 - dist.get_rank()
    )
    lap = Lap(1.0, {"data": 0.25, "validation": 0.5}, warm_up=False, joules=10.0 * (rank + 1))
    waits = 0.1 * (rank + 1)
    communication = StepCommunication(waits, (rank + 1) << 20, rank << 20, wait_cpu_seconds=0.5)
    runtime = Runtime(RankInfo(rank=rank, world=world), torch.device("cpu"), dist.group.WORLD)
    return collect(outcome, config, runtime, lap, communication, peak=1e12), forwards


def collect(
    outcome: StepOutcome,
    config: Config,
    runtime: Runtime,
    lap: Lap,
    communication: StepCommunication,
    *,
    peak: float | None = None,
) -> StepRecord:
    """The record of a step."""
    record, _ = collect_step(
        outcome,
        config,
        runtime,
        step=3,
        lr=0.1,
        lap=lap,
        checkpoint_seconds=0.0,
        communication=communication,
        bytes_per_value=4,
        peak=peak,
    )
    return record


@pytest.mark.parametrize(
    ("formats", "there", "home"),
    [
        ({}, 4 * H, 4 * H),
        ({"row_dtype": "bf16"}, 2 * H, 4 * H),
        ({"row_dtype": "fp8", "sum_dtype": "bf16"}, packed_bytes(H), 2 * H),
    ],
)
def test_bytes_of_a_row_are_those_that_travel(
    formats: dict[str, str], there: int, home: int
) -> None:
    config = replace(CONFIG, moe=replace(CONFIG.moe, dispatch=DispatchConfig(**formats)))
    assert row_bytes(config, 4) == 2 * (there + home)


def by_loop(forwards: list[Forward], *, ep: int, scope: str) -> dict[str, float]:
    """Every figure of one layer, counted pair by pair."""
    chosen = [[0] * E for _ in forwards]
    ran = [[0] * E for _ in forwards]
    found = dict.fromkeys(("pairs", "pairs_dropped", "pairs_added", "tokens_without_expert"), 0)
    mass = dict.fromkeys(("chosen", "dropped", "added"), 0)
    for n, forward in enumerate(forwards):
        kept = set(
            zip(forward.routing.token_N.tolist(), forward.routing.expert_N.tolist(), strict=True)
        )
        for token in range(T):
            found["tokens_without_expert"] += not any((token, e) in kept for e in range(E))
            for expert in range(E):
                top = bool(forward.scores.chosen_TE[token, expert])
                has = (token, expert) in kept
                amount = int(float(forward.scores.score_TE[token, expert].detach()) * 2**24)
                chosen[n][expert] += top
                ran[n][expert] += has
                found["pairs"] += top
                found["pairs_dropped"] += top and not has
                found["pairs_added"] += has and not top
                mass["chosen"] += amount * top
                mass["dropped"] += amount * (top and not has)
                mass["added"] += amount * (has and not top)
    ratios = _ratios(forwards, chosen, ran, ep=ep)
    together = {(f.micro_batch, f.rank // ep if scope == "ep" else f.rank) for f in forwards}
    ratios["tokens_per_expert_over_tile"] = found["pairs"] / len(together) / E / M
    return {**found, **ratios, **_shares(mass)}


def _shares(mass: dict[str, int]) -> dict[str, float]:
    return {f"score_{name}_share": mass[name] / mass["chosen"] for name in ("dropped", "added")}


def _ratios(
    forwards: list[Forward], chosen: list[list[int]], ran: list[list[int]], *, ep: int
) -> dict[str, float]:
    busiest = tiles = unrounded = 0
    populations = {(f.micro_batch, f.rank // ep) for f in forwards}
    for micro_batch, group in populations:
        members = [
            n
            for n, f in enumerate(forwards)
            if (f.micro_batch, f.rank // ep) == (micro_batch, group)
        ]
        per_expert = [-(-sum(ran[n][e] for n in members) // M) for e in range(E)]
        unrounded += sum(-(-sum(chosen[n][e] for n in members) // M) for e in range(E))
        per_rank = [sum(per_expert[r * E // ep : (r + 1) * E // ep]) for r in range(ep)]
        tiles += sum(per_rank)
        busiest += max(per_rank)
    freq = [sum(row[e] for row in chosen) for e in range(E)]
    return {
        "tiles_max_over_mean": busiest / (tiles / ep),
        "load_max_over_mean": max(freq) / (sum(freq) / E),
        "tile_waste": (tiles * M - sum(map(sum, ran))) / (tiles * M),
        "tile_waste_unrounded": (unrounded * M - sum(freq)) / (unrounded * M),
        "dead_experts": freq.count(0),
    }


@pytest.mark.parametrize(
    ("rule", "scope"), [("nearest", "ep"), ("none", "ep"), ("nearest", "rank")]
)
@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 2), (4, 4), (4, 2), (2, 1)])
def test_every_layer_is_what_a_loop_counts(
    world: int, ep: int, rule: str, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(
        CONFIG,
        moe=replace(CONFIG.moe, rounding=RoundingConfig(rule, tile=M, scope=scope)),
        parallel=ParallelConfig(ep=ep),
    )
    generator = torch.Generator().manual_seed(world * 10 + ep)
    router_LEH = torch.randn(LAYERS, E, H, generator=generator)
    # An expert that nobody likes, and a layer that is less even than the other.
    router_LEH[1, 0] = -3 * router_LEH[1, 1:4].sum(0)
    x_PMLTH = torch.randn(world, MICRO_BATCHES, LAYERS, T, H, generator=generator)
    x_PMLTH[:, :, 1] += 3 * router_LEH[1, 1:4].sum(0)
    results = run_ranks(run_step, world, config, router_LEH, x_PMLTH, monkeypatch)
    record = results[0][0]
    forwards = [forward for _, of_rank in results for forward in of_rank]
    assert list(record.layers) == [1, 2]
    for row, load in enumerate(record.layers.values()):
        want = by_loop([f for f in forwards if f.layer == row], ep=ep, scope=scope)
        got = load.flat()
        moved = {"pairs_moved_share", "score_moved_share"}
        assert want.keys() == got.keys() - moved
        for name, value in want.items():
            assert got[name] == pytest.approx(value, rel=1e-12), name
        dropped_or_added = want["pairs_dropped"] + want["pairs_added"]
        assert got["pairs_moved_share"] == dropped_or_added / want["pairs"]
        assert (dropped_or_added > 0) is (rule != "none")
    assert record.load.dead_experts >= 1
    assert all(other.layers == record.layers for other, _ in results)
    assert record.load.pairs == world * MICRO_BATCHES * LAYERS * T * K
    # 100 tokens in a second; the rest by test_flops.
    assert record.speed.tokens_per_second_per_rank == pytest.approx(100 / world)
    flops = flops_per_token(config)
    assert record.speed.tflops_per_rank == pytest.approx(100 / world * flops.model / 1e12)
    assert record.speed.palm_mfu == pytest.approx(100 / world * flops.palm / 1e12)
    assert record.speed.palm_mfu > record.speed.mfu
    assert (record.times.data_seconds, record.times.validation_seconds) == (0.25, 0.5)
    # Rank r computed for r + 1 seconds, half a second asked for messages, and needs 8 - r GiB.
    assert (record.slowest.slowest_rank, record.memory_gib) == (world - 1, 8.0)
    assert record.slowest.slowest_over_mean == pytest.approx(2 * world / (world + 1))
    # Rank r's device took 10 (r + 1) joules.
    assert record.energy.energy_joules == 5 * world * (world + 1)
    assert record.energy.watts_per_rank == 5 * (world + 1)
    assert record.energy.tokens_per_joule == 100 / record.energy.energy_joules
    # Rank r waited (r + 1) / 10 s of a second, and sent r + 1 MiB near and r MiB far.
    traffic = record.traffic
    assert traffic.exposed_seconds == traffic.exposed_share == pytest.approx(0.1 * (world + 1) / 2)
    assert (traffic.node_mib, traffic.remote_mib) == (
        world * (world + 1) / 2,
        world * (world - 1) / 2,
    )


def test_no_collective_but_the_two_that_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """One all-reduce of counts, one all-gather of times."""
    calls: list[str] = []
    for name in ("all_reduce", "all_gather"):
        real = getattr(dist, name)

        def counted(*args, name=name, real=real, **kwargs):
            if dist.get_rank() == 0:
                calls.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(f"distmoe.train.collect.dist.{name}", counted)
    config = replace(CONFIG, parallel=ParallelConfig(ep=2))
    none = StepOutcome(2.0, 1.0, 1.0, 0.5, False, 100, 0.1, [[some_stats(), some_stats()]])

    def collect_none(rank: int) -> None:
        runtime = Runtime(RankInfo(rank=rank, world=2), torch.device("cpu"), dist.group.WORLD)
        collect(none, config, runtime, Lap(1.0, {}, warm_up=True), StepCommunication())

    run_ranks(collect_none, 2)
    assert calls == ["all_reduce", "all_gather"]


def test_on_a_gpu_only_timed_kernels_tell_the_slowest_rank() -> None:
    """What the host did says nothing there."""
    outcome = StepOutcome(2.0, 1.0, 1.0, 0.5, False, 100, 7.0, [[some_stats(), some_stats()]])
    alone = Runtime(RankInfo(rank=0, world=1), torch.device("cuda"), None)

    def record(communication: StepCommunication) -> StepRecord:
        return collect(outcome, CONFIG, alone, Lap(1.0, {}, warm_up=True), communication)

    timed = record(StepCommunication(kernel_seconds=0.25))
    assert (timed.slowest.slowest_over_mean, timed.slowest.slowest_rank) == (1.0, 0)
    unknown = record(StepCommunication())
    assert math.isnan(unknown.slowest.slowest_over_mean)
    assert unknown.slowest.slowest_rank is None
    assert "throughput/slowest_rank" not in unknown.scalars()


def some_stats() -> MoEStats:
    count_E, one = torch.full((E,), 8), torch.tensor(1)
    return MoEStats(count_E, count_E, one, one, one, one, one, one, 1, 1)


def test_counts_of_a_layer_copy_nothing_from_the_host() -> None:
    """On a GPU each such copy would wait for the device."""
    made: list[str] = []

    class Noted(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (torch.tensor, torch.as_tensor):
                made.append(str(func))
            return func(*args, **(kwargs or {}))

    stats = some_stats()
    with Noted():
        counts = stats.own()
    assert len(counts) == len(DEVICE_COUNTS)
    assert made == []


def test_sums_of_scores_are_exact_beyond_32_bits() -> None:
    """A thousand scores of 1 are 2^34 units."""
    layer = MoE(replace(CONFIG.moe, num_experts=1, top_k=1, rounding=RoundingConfig("none")))
    layer(torch.randn(1024, H, generator=torch.Generator().manual_seed(0)))
    assert int(layer.stats.chosen_mass) == 1024 << 24
    assert int(layer.stats.dropped_mass) == int(layer.stats.added_mass) == 0
