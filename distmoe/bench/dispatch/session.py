"""One rank of the bench, and what the ranks found together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist

from distmoe.bench.dispatch.check import MOST_WRONG, rounding_errors, worst_errors
from distmoe.bench.dispatch.exposed import Exposed, measure_exposed
from distmoe.bench.dispatch.layer import Device, Layer
from distmoe.bench.dispatch.measure import Timing, measure, slowest
from distmoe.bench.dispatch.peers import MissingPeerError, load_peer
from distmoe.bench.dispatch.report import ExposedLine, Line
from distmoe.bench.dispatch.subjects import OwnWay, Subject
from distmoe.bench.dispatch.ways import Way
from distmoe.bench.dispatch.wire import (
    Interface,
    counted_bytes,
    expected_rows,
    gather_pairs,
    hops,
)
from distmoe.comm import make_exchange
from distmoe.config import MoEConfig
from distmoe.planner.cost_model import predict
from distmoe.planner.layer_shape import LayerShape
from distmoe.planner.machine_profile import Profile
from distmoe.planner.measure_device import measure_copy, measure_gemm, measure_launch
from distmoe.planner.measure_links import measure_links
from distmoe.planner.row_volumes import RankLayout

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """``interface``: of the network, "" for none. ``exposed``: measure that, too."""

    shape: LayerShape
    layout: RankLayout
    device: Device
    ways: Sequence[Way]
    peers: Sequence[str]
    rounds: int
    interface: str = ""
    exposed: bool = False


@dataclass(frozen=True)
class RankResult:
    """Of one rank. ``predicted_s``: of the ways. ``errors``: of every peer that is here, by tensor;
    ``missing``: why others are not; ``rounding``: the same of ways whose rows are rounded.
    ``routing_bytes``: of rows between nodes, of every subject with a level."""

    profile: dict[str, Any]
    timings: list[Timing]
    predicted_s: list[float]
    errors: dict[str, dict[str, float]]
    missing: dict[str, str]
    rounding: dict[str, dict[str, float]]
    routing_bytes: list[int | None]
    exposed: list[Exposed]

    @staticmethod
    def read(content: dict[str, Any]) -> RankResult:
        """From what `asdict` made of one."""
        timings = [Timing(**timing) for timing in content["timings"]]
        exposed = [Exposed(**figures) for figures in content["exposed"]]
        return RankResult(**{**content, "timings": timings, "exposed": exposed})


def measure_rank(settings: Settings, group: dist.ProcessGroup) -> RankResult:
    """Everything; collective over all ranks of the run."""
    profile = _profile(settings, group)
    layer = _layer(settings, group, settings.device)
    errors, missing = _check_peers(settings, group)
    rounding = _check_rounding(settings, group)
    subjects: list[Subject] = [OwnWay(layer, way) for way in settings.ways]
    right = [name for name, of in errors.items() if max(of.values()) <= MOST_WRONG]
    subjects += [load_peer(name, layer) for name in right]
    interface = Interface(settings.interface) if settings.interface else None
    timings = measure(layer, subjects, rounds=settings.rounds, interface=interface)
    return RankResult(
        profile=asdict(profile),
        timings=timings,
        predicted_s=predicted_s(settings, profile),
        errors=errors,
        missing=missing,
        rounding=rounding,
        routing_bytes=_routing_bytes(settings, layer, subjects),
        exposed=(
            measure_exposed(layer, settings.ways, rounds=settings.rounds)
            if settings.exposed
            else []
        ),
    )


def _routing_bytes(
    settings: Settings, layer: Layer, subjects: Sequence[Subject]
) -> list[int | None]:
    """Of every subject, pair by pair; collective."""
    layout, pairs_PTP = settings.layout, gather_pairs(layer)
    found: list[int | None] = []
    for i, subject in enumerate(subjects):
        if not subject.level:
            found.append(None)
            continue
        shape = _shape(settings, i)
        hop_PP = hops(pairs_PTP, layout, subject.level)
        _, remote = counted_bytes(
            hop_PP, layout, layer.exchange.rank, there=shape.there_bytes, home=shape.home_bytes
        )
        found.append(remote)
    return found


def _shape(settings: Settings, subject: int) -> LayerShape:
    """With rows as they travel in this way; a peer's travel as they are computed."""
    if subject < len(settings.ways):
        return settings.ways[subject].shape(settings.shape)
    return settings.shape


def _layer(
    settings: Settings, group: dist.ProcessGroup, device: Device, rule: str = "balance"
) -> Layer:
    return Layer(
        settings.shape, group, ranks_per_node=settings.layout.per_node, device=device, rule=rule
    )


def _check_peers(
    settings: Settings, group: dist.ProcessGroup
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """On a device that computes, and plain top-k, which all peers can."""
    layer = _layer(settings, group, Device(), rule="none")
    errors, missing = {}, {}
    for name in settings.peers:
        try:
            errors[name] = worst_errors(layer, load_peer(name, layer))
        except MissingPeerError as error:
            missing[name] = str(error)
    return errors, missing


def _check_rounding(settings: Settings, group: dist.ProcessGroup) -> dict[str, dict[str, float]]:
    """On a device that computes."""
    layer = _layer(settings, group, Device())
    return {
        way.name: rounding_errors(layer, way)
        for way in settings.ways
        if way.row_dtype != "computed"
    }


def _profile(settings: Settings, group: dist.ProcessGroup) -> Profile:
    """Of these ranks, measured now."""
    shape, per_node = settings.shape, settings.layout.per_node
    exchange = make_exchange(group)
    links = measure_links(exchange, ranks_per_node=per_node, device=CPU)
    rate, launch_s = settings.device.pairs_per_s * shape.flops_per_pair, 0.0
    if not settings.device.sleeps:
        moe = MoEConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
        )
        num_local, pairs = shape.num_experts // exchange.size, shape.num_tokens * shape.top_k
        rate = measure_gemm(
            moe, num_experts=num_local, pairs=pairs, device=CPU, dtype=torch.float32
        )
        launch_s = measure_launch(moe, device=CPU, dtype=torch.float32)
    own = measure_copy(CPU)
    return Profile(
        links={"own": own} | {figures.name: figures.link(per_node) for figures in links},
        gemm_flops={"fp32": rate},
        host_latency_s=launch_s,
    )


def predicted_s(settings: Settings, profile: Profile) -> list[float]:
    """Of forward and backward in every way."""
    found = []
    for way in settings.ways:
        schedule = way.schedule(settings.layout)
        one = predict(way.shape(settings.shape), settings.layout, profile, schedule)
        passes = (one.forward, one.backward)
        found.append(sum(p.overlapped_s if way.overlap else p.serial_s for p in passes))
    return found


def lines(settings: Settings, ranks: Sequence[RankResult]) -> list[Line]:
    """One for every subject."""
    found = []
    worst = slowest([rank.timings for rank in ranks])
    for i, timing in enumerate(worst):
        of_ranks = [rank.timings[i] for rank in ranks]
        counted = [float(of_rank.remote_bytes) for of_rank in of_ranks]
        routing, formula, off = None, None, None
        if timing.level:
            shape = _shape(settings, i)
            by_rank = [rank.routing_bytes[i] or 0 for rank in ranks]
            routing = fmean(by_rank)
            # Of these rows half are partial sums on their way home.
            rows = expected_rows(settings.layout, timing.level, shape=shape)
            formula = rows * (shape.there_bytes + shape.home_bytes) / 2
            if routing:
                off = max(abs(a / b - 1) for a, b in zip(counted, by_rank, strict=True))
        interface = None
        if of_ranks[0].interface_bytes is not None:
            # Each rank has read the counter of its host, for all ranks there.
            per_host = [float(of_rank.interface_bytes or 0) for of_rank in of_ranks]
            interface = fmean(per_host) / settings.layout.per_node
        found.append(
            Line(
                timing=timing,
                predicted_s=ranks[0].predicted_s[i] if i < len(settings.ways) else None,
                counted=fmean(counted),
                routing=routing,
                formula=formula,
                interface=interface,
                worst_rank=off,
            )
        )
    return found


def exposed_lines(settings: Settings, ranks: Sequence[RankResult]) -> list[ExposedLine]:
    """One for every way, if exposed communication was measured."""
    if not settings.exposed:
        return []
    by_way = zip(settings.ways, *(rank.exposed for rank in ranks), strict=True)
    return [ExposedLine.of(way, found) for way, *found in by_way]


def notes(ranks: Sequence[RankResult]) -> list[str]:
    """What is to be said of every peer, in what it differs, that it is wrong, or why it is missing;
    and of ways that round rows."""
    first = ranks[0]
    said = [f"{timing.name}: {timing.note}" for timing in first.timings if timing.note]
    for name, errors in first.errors.items():
        tensor, error = max(errors.items(), key=lambda item: item[1])
        verdict = "checked" if error <= MOST_WRONG else "WRONG, not timed"
        said.append(f"{name}: {verdict}; largest difference from our layer {error:.1e} ({tensor})")
    said += [f"{name}: skipped, {reason}" for name, reason in first.missing.items()]
    for name, errors in first.rounding.items():
        verdict = "WRONG" if max(errors.values()) else "checked"
        said.append(
            f"{name}: {verdict}; largest difference from rows that were rounded beforehand "
            f"{max(errors.values()):.1e}"
        )
    return said


def something_is_wrong(ranks: Sequence[RankResult]) -> bool:
    """A peer computes something else, or rows are not rounded as they should be."""
    first = ranks[0]
    wrong_peers = [name for name, of in first.errors.items() if max(of.values()) > MOST_WRONG]
    return bool(wrong_peers) or any(max(errors.values()) for errors in first.rounding.values())
