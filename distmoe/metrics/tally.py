"""The figures of a run out of its steps: what the summary prints and `distmoe report` compares."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distmoe.metrics.record import Energy

# Figures of a step whose median over the steps is a figure of the run.
MEDIANS = (
    "tokens_per_second_per_rank",
    "step_seconds",
    "tflops_per_rank",
    "palm_tflops_per_rank",
    "mfu",
    "palm_mfu",
    "slowest_over_mean",
    "exposed_share",
    "load_max_over_mean",
    "tiles_max_over_mean",
    "tile_waste",
    "tile_waste_unrounded",
    "pairs_moved_share",
    "score_moved_share",
)

# Figures that are added up over all steps.
SUMS = (
    "tokens",
    "pairs_dropped",
    "pairs_added",
    "tokens_without_expert",
    "step_seconds",
    "data_seconds",
    "forward_backward_seconds",
    "optimizer_seconds",
    "exposed_seconds",
    "checkpoint_seconds",
    "validation_seconds",
)

# Figures whose sums over steps are divided.
DIVIDED = ("energy_joules", "tokens", "ranks")

SECONDS_PER_DAY = 86400
JOULES_PER_KWH = 3.6e6

Columns = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class RunFigures:
    """``steps``: all; of them ``measured``: those after the warm-up of their start, or all if there
    are no others. ``medians``: over the measured steps, nan for what no step has;
    ``warm_up_speed``: tokens/s/rank, median of the others. ``trained_tokens``: of steps that were
    not skipped. ``slowest_rank``: the one that was so most often, None if that was never known.
    ``routing``: forced if it ever was. ``ranks``: of the last step. ``energy``: of the measured
    steps; ``joules``: of all steps that have them."""

    steps: int
    measured: int
    skipped: int
    ranks: int
    routing: str
    trained_tokens: int
    sums: dict[str, float]
    medians: dict[str, float]
    warm_up_speed: float
    slowest_rank: int | None
    memory_gib: float
    energy: Energy
    joules: float

    @property
    def kwh(self) -> float:
        """Of all steps."""
        return self.joules / JOULES_PER_KWH

    @property
    def tokens_per_second(self) -> float:
        """Median, of all ranks together."""
        return self.medians["tokens_per_second_per_rank"] * self.ranks

    @property
    def tokens_per_day(self) -> float:
        """At the median speed, without checkpoints and validations."""
        return self.tokens_per_second * SECONDS_PER_DAY

    @property
    def split(self) -> dict[str, float]:
        """Where the seconds of the steps went; the parts add up to the sum of ``step_seconds``.

        ``exposed``: the mean rank's, out of rank 0's forward and backward. ``rest``: counting
        tokens, figures, files.
        """
        sums = self.sums
        known = ("data_seconds", "forward_backward_seconds", "optimizer_seconds")
        return {
            "data": sums["data_seconds"],
            "compute": sums["forward_backward_seconds"] - sums["exposed_seconds"],
            "exposed": sums["exposed_seconds"],
            "optimizer": sums["optimizer_seconds"],
            "rest": sums["step_seconds"] - sum(sums[name] for name in known),
        }


class Tally:
    """Takes the steps of a run one by one, as flat records or lines of metrics.jsonl."""

    def __init__(self) -> None:
        self._sums = dict.fromkeys(SUMS, 0.0)
        self._columns = {name: array("d") for name in (*MEDIANS, *DIVIDED)}
        self._warm = array("b")
        self._slowest: Counter[int] = Counter()
        self._trained = self._skipped = self._ranks = 0
        self._memory = 0.0
        self._forced = False

    def __len__(self) -> int:
        return len(self._warm)

    def add(self, step: Mapping[str, Any]) -> None:
        """KeyError for a figure that ``step`` lacks. None is nan."""
        for name in SUMS:
            self._sums[name] += step[name]
        for name, column in self._columns.items():
            value = step[name]
            column.append(math.nan if value is None else value)
        self._warm.append(step["warm_up"])
        if step["slowest_rank"] is not None:
            self._slowest[step["slowest_rank"]] += 1
        self._skipped += step["skipped"]
        self._trained += 0 if step["skipped"] else step["tokens"]
        self._ranks = step["ranks"]
        self._memory = max(self._memory, step["memory_gib"])
        self._forced |= step["routing"] == "forced"

    def figures(self) -> RunFigures:
        """Of all steps so far. ValueError if there is none."""
        if not self._warm:
            raise ValueError("no step")
        every = {name: np.array(column) for name, column in self._columns.items()}
        warm = np.array(self._warm, dtype=bool)
        used = warm if warm.all() else ~warm
        measured = {name: column[used] for name, column in every.items()}
        return RunFigures(
            steps=len(self),
            measured=int(used.sum()),
            skipped=self._skipped,
            ranks=self._ranks,
            routing="forced" if self._forced else "real",
            trained_tokens=self._trained,
            sums=dict(self._sums),
            medians={name: _median(measured[name]) for name in MEDIANS},
            warm_up_speed=_median(every["tokens_per_second_per_rank"][warm]),
            slowest_rank=next((rank for rank, _ in self._slowest.most_common(1)), None),
            memory_gib=self._memory,
            energy=_energy(measured),
            joules=_energy(every).energy_joules,
        )


def _median(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if known.size else math.nan


def _energy(columns: Columns) -> Energy:
    """Of the steps that have joules. Sums over sums, because the counter moves too seldom for the
    figure of one short step."""
    known = ~np.isnan(columns["energy_joules"])
    if not known.any():
        return Energy(math.nan, math.nan, math.nan)
    joules, tokens = (float(columns[name][known].sum()) for name in ("energy_joules", "tokens"))
    rank_seconds = float((columns["step_seconds"] * columns["ranks"])[known].sum())
    return Energy(
        energy_joules=joules,
        watts_per_rank=joules / rank_seconds if rank_seconds else math.nan,
        tokens_per_joule=tokens / joules if joules else math.nan,
    )
