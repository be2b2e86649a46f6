"""The figures that a report has of every run, by name, and how people read them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distmoe.metrics.report.run_files import Run
from distmoe.metrics.tally import MEDIANS, SECONDS_PER_DAY

Flat = dict[str, Any]

# Where the seconds of a run go, in the order in which pictures and tables have them.
PARTS = ("data", "compute", "exposed", "optimizer", "rest", "validation", "checkpoint")


def flat_figures(run: Run) -> Flat:
    """Every figure by a name that is stable; None for what a run does not have."""
    figures, seconds = run.figures, seconds_by_part(run)
    last = run.validations[-1] if run.validations else {}
    flat = {
        "state": run.state,
        "steps": run.steps[-1]["step"],
        "measured_steps": figures.measured,
        "skipped_steps": figures.skipped,
        "starts": len(run.starts),
        "ranks": figures.ranks,
        "device": run.starts[-1]["device"],
        "dtype": run.starts[-1]["dtype"],
        "routing": figures.routing,
        "trained_tokens": figures.trained_tokens,
        "loss": run.steps[-1]["loss"],
        "validation_loss": last.get("validation_loss"),
        "unigram_entropy": last.get("unigram_entropy"),
        "tokens_per_second": figures.tokens_per_second,
        "tokens_per_day": figures.tokens_per_day,
        "tokens_per_day_in_all": figures.trained_tokens * SECONDS_PER_DAY / sum(seconds.values()),
        "warm_up_tokens_per_second_per_rank": figures.warm_up_speed,
        "slowest_rank": figures.slowest_rank,
        "memory_gib": figures.memory_gib,
        "watts_per_rank": figures.energy.watts_per_rank,
        "tokens_per_joule": figures.energy.tokens_per_joule,
        "energy_kwh": figures.kwh,
        "pairs_dropped": figures.sums["pairs_dropped"],
        "pairs_added": figures.sums["pairs_added"],
        "tokens_without_expert": figures.sums["tokens_without_expert"],
        **{name: figures.medians[name] for name in MEDIANS},
        **{f"{part}_seconds": value for part, value in seconds.items()},
    }
    return {name: None if _is_nan(value) else value for name, value in flat.items()}


def seconds_by_part(run: Run) -> dict[str, float]:
    """Of PARTS: all steps, validations and what the loop lost to checkpoints, in seconds."""
    after_the_last_step = sum(end["checkpoint_seconds"] for end in run.ends)
    return {
        **run.figures.split,
        "validation": sum(validation["seconds"] for validation in run.validations),
        "checkpoint": run.figures.sums["checkpoint_seconds"] + after_the_last_step,
    }


@dataclass(frozen=True)
class Row:
    """A line of a table: ``show`` makes a cell of the flat figures of a run."""

    label: str
    show: Callable[[Flat], str]


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _shown(label: str, form: str, *names: str) -> Row:
    """Figures in their ``form``; a dash where one of them is missing."""

    def show(flat: Flat) -> str:
        values = [flat[name] for name in names]
        return "-" if None in values else form.format(*values)

    return Row(label, show)


def _part(label: str, part: str) -> Row:
    def show(flat: Flat) -> str:
        whole = sum(flat[f"{name}_seconds"] for name in PARTS)
        seconds = flat[f"{part}_seconds"]
        return f"{seconds:,.1f} s ({seconds / max(whole, 1e-9):.1%})"

    return Row(label, show)


TWO_SHARES = "{:.1%} ({:.1%})"
SECTIONS: dict[str, tuple[Row, ...]] = {
    "run": (
        _shown("state", "{}", "state"),
        _shown("device", "{}", "device"),
        _shown("dtype", "{}", "dtype"),
        _shown("ranks", "{}", "ranks"),
        _shown("starts", "{}", "starts"),
        _shown("steps", "{:,}", "steps"),
        _shown("steps skipped", "{:,}", "skipped_steps"),
        _shown("routing", "{}", "routing"),
    ),
    "training": (
        _shown("trained tokens", "{:,}", "trained_tokens"),
        _shown("training loss, last step", "{:.4f}", "loss"),
        _shown("validation loss", "{:.4f}", "validation_loss"),
        _shown("unigram entropy", "{:.4f}", "unigram_entropy"),
    ),
    "speed, medians without the first steps of a start": (
        _shown("steps measured", "{:,}", "measured_steps"),
        _shown("tokens/s/rank", "{:,.0f}", "tokens_per_second_per_rank"),
        _shown("tokens/s, all ranks", "{:,.0f}", "tokens_per_second"),
        _shown("tokens a day", "{:,.0f}", "tokens_per_day"),
        _shown("of all time, with pauses and warm-up", "{:,.0f}", "tokens_per_day_in_all"),
        _shown("tokens/s/rank in the warm-up", "{:,.0f}", "warm_up_tokens_per_second_per_rank"),
        _shown("seconds a step", "{:.4g}", "step_seconds"),
        _shown("TFLOP/s/rank (PaLM)", "{:.3g} ({:.3g})", "tflops_per_rank", "palm_tflops_per_rank"),
        _shown("MFU (PaLM)", TWO_SHARES, "mfu", "palm_mfu"),
        _shown("slowest rank over mean", "{:.2f}x", "slowest_over_mean"),
        _shown("slowest most often", "rank {}", "slowest_rank"),
        _shown("exposed communication", "{:.1%}", "exposed_share"),
        _shown("memory, largest rank", "{:.2f} GiB", "memory_gib"),
        _shown("watts of a rank's device, mean", "{:,.0f} W", "watts_per_rank"),
        _shown("tokens per joule, mean", "{:,.3g}", "tokens_per_joule"),
        _shown("energy in all", "{:,.3g} kWh", "energy_kwh"),
    ),
    "time": (
        _part("data", "data"),
        _part("compute of forward and backward", "compute"),
        _part("exposed communication", "exposed"),
        _part("clipping and optimizer", "optimizer"),
        _part("rest: figures, counting, files", "rest"),
        _part("validation", "validation"),
        _part("checkpoints", "checkpoint"),
    ),
    "experts, medians and sums": (
        _shown("busiest expert over mean", "{:.2f}x", "load_max_over_mean"),
        _shown("tiles of the busiest rank", "{:.2f}x", "tiles_max_over_mean"),
        _shown("tile waste (if not rounded)", TWO_SHARES, "tile_waste", "tile_waste_unrounded"),
        _shown("pairs moved (their scores)", TWO_SHARES, "pairs_moved_share", "score_moved_share"),
        _shown("pairs dropped", "{:,.0f}", "pairs_dropped"),
        _shown("pairs added", "{:,.0f}", "pairs_added"),
        _shown("tokens without expert", "{:,.0f}", "tokens_without_expert"),
    ),
}
