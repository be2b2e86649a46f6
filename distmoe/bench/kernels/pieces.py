"""Times of the single kernels behind a backend of the contract, and of its tile configurations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distmoe.bench.kernels.catalog import first_line
from distmoe.bench.kernels.check import Expected, faults
from distmoe.bench.kernels.clock import Clock, Samples, round_robin
from distmoe.bench.kernels.subjects import ContractSubject
from distmoe.kernels.moe_mlp.tiles import TileConfig, TileSpace
from distmoe.registry import MOE_MLP_TILES

# Calls that consist of kernels which another call has too: the rest is the difference.
DIFFERENCES = {"down": ("forward", "up"), "dx": ("dgrad", "da")}
# Kernels of the roofline behind a piece.
KERNELS_OF = {
    "forward": ("up", "down"),
    "dgrad": ("da", "dx"),
    "wgrad": ("wgrad_out", "wgrad_in"),
    **{name: (name,) for name in ("up", "down", "sum_y", "da", "dx", "sum_dx")},
}


def time_pieces(subject: ContractSubject, *, rounds: int, clock: Clock) -> dict[str, float]:
    """Median milliseconds by piece, a name in `KERNELS_OF`, in the order of execution."""
    subject.prepare("both")
    subject.run("both")
    samples = round_robin(subject.pieces(), rounds=rounds, clock=clock)
    subject.release()
    times = {name: sample.median for name, sample in samples.items()}
    for part, (whole, other) in DIFFERENCES.items():
        if other in times:
            times[part] = times.pop(whole) - times[other]
    order = ("up", "down", "forward", "sum_y", "da", "dx", "dgrad", "sum_dx", "wgrad")
    return {name: times[name] for name in order if name in times}


@dataclass
class Trial:
    """One tile configuration of one kernel of a backend: ``samples`` of the call that contains it,
    of which ``others_ms`` are other kernels'; or why there are none."""

    backend: str
    kernel: str
    config: TileConfig
    samples: Samples | None = None
    others_ms: float = 0.0
    why_not: str | None = None

    @property
    def ms(self) -> float:
        return float("inf") if self.samples is None else self.samples.median - self.others_ms


# Kernel of `tiles` -> the call that it is timed in, and the one to subtract.
_TIMED_IN = {
    "up": ("up", None),
    "down": ("forward", "up"),
    "dgrad": ("da", None),
    "dx": ("dgrad", "da"),
    "wgrad_in": ("wgrad", None),
    "wgrad_out": ("wgrad", None),
}


def check_trials(backend: str, subject: ContractSubject, expected: Expected) -> list[Trial]:
    """Every shipped configuration of ``backend``, the default of a kernel first; those that fail to
    run or compute wrong results say so."""
    space: TileSpace = MOE_MLP_TILES.load(backend)
    trials = [
        Trial(backend, kernel, config)
        for kernel, candidates in space.candidates.items()
        for config in candidates
    ]
    for trial in trials:
        try:
            with space.override(trial.kernel, trial.config):
                wrong = faults(subject, expected)
        except Exception as error:
            wrong = [first_line(error)]
        trial.why_not = "; ".join(wrong) or None
    return trials


def time_trials(
    trials: list[Trial], subject: ContractSubject, *, rounds: int, clock: Clock
) -> None:
    """Fill in the times of the trials that are right, those of one kernel in turn."""
    subject.prepare("both")
    subject.run("both")
    pieces = subject.pieces()
    for kernel, (whole, other) in _TIMED_IN.items():
        rivals = [trial for trial in trials if trial.kernel == kernel and trial.why_not is None]
        if not rivals:
            continue
        calls = {str(trial.config): _overridden(trial, pieces[whole]) for trial in rivals}
        if other is not None:
            calls["other"] = pieces[other]
        samples = round_robin(calls, rounds=rounds, clock=clock)
        for trial in rivals:
            trial.samples = samples[str(trial.config)]
            trial.others_ms = samples["other"].median if other is not None else 0.0
    subject.release()


def _overridden(trial: Trial, call: Callable[[], object]) -> Callable[[], object]:
    space: TileSpace = MOE_MLP_TILES.load(trial.backend)

    def run() -> None:
        with space.override(trial.kernel, trial.config):
            call()

    return run
