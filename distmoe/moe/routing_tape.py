"""Routing decisions of a checkpointed forward, replayed when the backward runs it again.

A recomputed forward must not route again: its scores may differ in the last bit, one token that
changes its expert makes counts disagree between ranks, and the job hangs. So the first forward
records every decision (which pairs, which rows go where), and the recomputation takes them back
in the same order. Only scores, which need gradients, are computed again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")

_current = threading.local()


class RoutingTape:
    """Decisions of one checkpointed region, in the order in which its forward made them."""

    def __init__(self) -> None:
        self._decisions: list[object] = []
        self._next = 0
        self._replaying = False

    @staticmethod
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The ``context_fn`` of torch.utils.checkpoint, which asks for every call of the region
        anew: one for its forward, one for its replay, with a tape of their own."""
        tape = RoutingTape()
        return tape._active(replaying=False), tape._active(replaying=True)

    @contextmanager
    def _active(self, *, replaying: bool) -> Iterator[None]:
        outer = getattr(_current, "tape", None)
        self._replaying, self._next = replaying, 0
        _current.tape = self
        try:
            yield
        finally:
            _current.tape = outer

    def _take(self, decide: Callable[[], T]) -> T:
        if not self._replaying:
            self._decisions.append(decide())
        decision: T = self._decisions[self._next]  # type: ignore[assignment]
        self._next += 1
        return decision


def decided(decide: Callable[[], T]) -> T:
    """``decide()``, or, in a recomputed forward, what it gave the first time."""
    tape: RoutingTape | None = getattr(_current, "tape", None)
    return decide() if tape is None else tape._take(decide)


def is_recomputed() -> bool:
    """Whether this forward is a recomputation, whose tokens have been counted already: with a tape,
    or without one, where it runs inside of a backward."""
    tape: RoutingTape | None = getattr(_current, "tape", None)
    in_backward = torch._C._current_graph_task_id() != -1
    return in_backward if tape is None else tape._replaying
