"""The figures of a run out of its steps: what the summary prints and `distmoe report` compares."""

from __future__ import annotations

import math
import statistics
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distmoe.metrics.energy import EnergyFigures, EnergyTally

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

SECONDS_PER_DAY = 86400


@dataclass(frozen=True)
class RunFigures:
    """``steps``: all; of them ``measured``: those after the warm-up of their start, or all if there
    are no others. ``medians``: over the measured steps, nan for what no step has;
    ``warm_up_speed``: tokens/s/rank, median of the others. ``trained_tokens``: of steps that were
    not skipped. ``slowest_rank``: the one that was so most often,
    None if that was never known. ``routing``: forced if it ever
    was. ``ranks``: of the last step. ``energy``: of the measured steps; ``joules``: of all steps
    that have them."""

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
    energy: EnergyFigures
    joules: float

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
        self._values = {name: array("d") for name in MEDIANS}
        self._warm = array("b")
        self._slowest: Counter[int] = Counter()
        self._energy = EnergyTally()
        self._trained = self._skipped = self._ranks = 0
        self._memory = 0.0
        self._forced = False

    def __len__(self) -> int:
        return len(self._warm)

    def add(self, step: Mapping[str, Any]) -> None:
        """KeyError for a figure that ``step`` lacks. None is nan."""
        for name in SUMS:
            self._sums[name] += step[name]
        for name in MEDIANS:
            value = step[name]
            self._values[name].append(math.nan if value is None else value)
        self._warm.append(step["warm_up"])
        if step["slowest_rank"] is not None:
            self._slowest[step["slowest_rank"]] += 1
        self._skipped += step["skipped"]
        self._trained += 0 if step["skipped"] else step["tokens"]
        self._ranks = step["ranks"]
        rank_seconds = step["step_seconds"] * step["ranks"]
        self._energy.add(
            joules=step["energy_joules"], tokens=step["tokens"], rank_seconds=rank_seconds
        )
        self._memory = max(self._memory, step["memory_gib"])
        self._forced |= step["routing"] == "forced"

    def figures(self) -> RunFigures:
        """Of all steps so far. ValueError if there is none."""
        if not self._warm:
            raise ValueError("no step")
        measured = [n for n, warm in enumerate(self._warm) if not warm]
        used = measured or range(len(self._warm))
        speed = self._values["tokens_per_second_per_rank"]
        return RunFigures(
            steps=len(self),
            measured=len(used),
            skipped=self._skipped,
            ranks=self._ranks,
            routing="forced" if self._forced else "real",
            trained_tokens=self._trained,
            sums=dict(self._sums),
            medians={name: _median([v[n] for n in used]) for name, v in self._values.items()},
            warm_up_speed=_median([speed[n] for n, warm in enumerate(self._warm) if warm]),
            slowest_rank=next((rank for rank, _ in self._slowest.most_common(1)), None),
            memory_gib=self._memory,
            energy=self._energy.figures(used),
            joules=self._energy.figures(range(len(self))).joules,
        )


def _median(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan
