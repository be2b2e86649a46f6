"""Time subjects against each other in one process, in turn."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from distmoe.bench.kernels.catalog import first_line, is_fault
from distmoe.bench.kernels.check import not_finite
from distmoe.bench.kernels.clock import Clock, Samples
from distmoe.bench.kernels.subjects import Subject

WARM_UPS = 3


@dataclass
class Outcome:
    """Of one subject: times by mode, or why there are none. ``wrong``: the results that failed the
    check, if it was timed in spite of them. ``failed``: it computed wrong results or broke off."""

    name: str
    pairs: int = 0
    samples: dict[str, Samples] = field(default_factory=dict)
    why_not: str | None = None
    wrong: str | None = None
    failed: bool = False

    def refuse(self, reason: str, *, failed: bool = False) -> None:
        self.samples, self.why_not, self.failed = {}, reason, self.failed or failed

    def break_off(self, error: Exception) -> None:
        self.refuse(first_line(error), failed=is_fault(error))


def measure(
    subjects: dict[str, Subject],
    outcomes: dict[str, Outcome],
    *,
    modes: list[str],
    rounds: int,
    clock: Clock,
) -> None:
    """Fill ``outcomes`` with ``rounds`` samples for every mode; a subject that breaks off gets
    none."""
    alive = list(subjects)
    for turn in range(-1, rounds):
        for name in list(alive):
            try:
                _one_turn(subjects[name], outcomes[name], turn, rounds, modes=modes, clock=clock)
            # Whatever a backend does, the others are measured.
            except Exception as error:
                outcomes[name].break_off(error)
                alive.remove(name)
        if alive:
            alive.append(alive.pop(0))


def _one_turn(
    subject: Subject, outcome: Outcome, turn: int, rounds: int, *, modes: list[str], clock: Clock
) -> None:
    """Turn -1 warms up; the last one also looks at the results."""
    outcome.pairs = subject.pairs
    for mode in modes:
        for _ in range(WARM_UPS if turn < 0 else 1):
            subject.prepare(mode)
            spent = clock(partial(subject.run, mode))
        if turn >= 0:
            outcome.samples.setdefault(mode, Samples()).ms.append(spent)
        if turn == rounds - 1 and subject.checked:
            unwritten = not_finite(subject, mode)
            if unwritten:
                raise AssertionError(f"not finite: {', '.join(unwritten)}")
        subject.release()
