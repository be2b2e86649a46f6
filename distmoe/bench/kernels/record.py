"""A result as plain data: what goes into the JSON file, and what tables and pictures show."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from distmoe.bench.kernels.catalog import BOUND
from distmoe.bench.kernels.measure import Outcome
from distmoe.bench.kernels.pieces import KERNELS_OF, Trial
from distmoe.bench.kernels.session import Result
from distmoe.planner.roofline import floor_ms, layer_flops, layer_work


def record_of(result: Result, device: str) -> dict[str, Any]:
    """Times in milliseconds, rates in TFLOP/s and GB/s; a share is None where it has no base."""
    floors = floor_ms(result.size, device)
    return {
        "shape": asdict(result.shape),
        "rounding": result.rule,
        "pairs": result.size.pairs,
        "padded_pairs": result.padded_pairs,
        "checked_tokens": result.checked_tokens,
        "floor_ms": floors,
        "router": {name: sample.summary() for name, sample in result.router.samples.items()}
        | {"total_ms": result.router.total_ms},
        "backends": _backends(result, floors),
        "pieces": {
            name: {piece: _piece(result, piece, ms, floors) for piece, ms in times.items()}
            for name, times in result.pieces.items()
        },
        "tiles": {
            name: [_trial(trial) for trial in trials] for name, trials in result.trials.items()
        },
        "profiles": {
            name: [asdict(kernel) for kernel in kernels]
            for name, kernels in result.profiles.items()
        },
    }


def _backends(result: Result, floors: dict[str, float]) -> dict[str, Any]:
    by_name = {outcome.name: outcome for outcome in result.outcomes}
    return {
        name: {
            "why_not": outcome.why_not,
            "wrong": outcome.wrong,
            "modes": {
                mode: _figures(result, outcome, mode, by_name.get(BOUND), floors)
                for mode in outcome.samples
            },
        }
        for name, outcome in by_name.items()
    }


def _figures(
    result: Result, outcome: Outcome, mode: str, bound: Outcome | None, floors: dict[str, float]
) -> dict[str, Any]:
    samples = outcome.samples[mode]
    tflops = _tflops(result, outcome, mode)
    has_bound = bound is not None and mode in bound.samples
    # The bound's pairs are a few less: rates are compared, not times.
    of_floor = None
    if mode in floors:
        of_floor = tflops / _rate(result, result.size.pairs, mode, floors[mode])
    return samples.summary() | {
        "tflops": tflops,
        "of_bound": tflops / _tflops(result, bound, mode) if bound and has_bound else None,
        "of_floor": of_floor,
    }


def _tflops(result: Result, outcome: Outcome, mode: str) -> float:
    return _rate(result, outcome.pairs, mode, outcome.samples[mode].median)


def _rate(result: Result, pairs: int, mode: str, ms: float) -> float:
    return layer_flops(pairs, result.shape.H, result.shape.I)[mode] / ms / 1e9


def _piece(result: Result, piece: str, ms: float, floors: dict[str, float]) -> dict[str, Any]:
    work = layer_work(result.size)
    kernels = KERNELS_OF[piece]
    flops = sum(work[kernel].flops for kernel in kernels)
    floor = sum(floors[kernel] for kernel in kernels) if floors else None
    # A difference of two times: of a shape that is all launch, no more than noise.
    if ms <= 0:
        return {"ms": ms, "tflops": None, "gb_per_s": None, "of_floor": None}
    return {
        "ms": ms,
        "tflops": flops / ms / 1e9 if flops else None,
        "gb_per_s": sum(work[kernel].bytes for kernel in kernels) / ms / 1e6,
        "of_floor": None if floor is None else floor / ms,
    }


def _trial(trial: Trial) -> dict[str, Any]:
    summary = trial.samples.summary() if trial.samples is not None else {}
    return {
        "kernel": trial.kernel,
        "config": str(trial.config),
        "fields": asdict(trial.config),
        "why_not": trial.why_not,
        "ms": trial.ms if trial.samples is not None else None,
        **summary,
    }
