"""The expert kernels with every call timed: on the timeline, by the kernel clock, in profiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from distmoe.comm import Observer
from distmoe.kernels.moe_mlp import MoeMlp
from distmoe.named_range import named_range


class TimedMlp:
    """``mlp`` for one layer's pass; ``observer`` notes each call, numbered as it comes."""

    def __init__(self, mlp: MoeMlp, observer: Observer) -> None:
        self._mlp, self._observer = mlp, observer
        self._calls: dict[str, int] = {}

    def forward(self, *args: Any, **kwargs: Any) -> None:
        with self._noted("forward", self._next("forward")):
            self._mlp.forward(*args, **kwargs)

    def row_sum(self, *args: Any, **kwargs: Any) -> None:
        with self._noted("row_sum"):
            self._mlp.row_sum(*args, **kwargs)

    def dgrad(self, *args: Any, **kwargs: Any) -> None:
        with self._noted("dgrad", self._next("dgrad")):
            self._mlp.dgrad(*args, **kwargs)

    def wgrad(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        with self._noted("wgrad"):
            return self._mlp.wgrad(*args, **kwargs)

    @contextmanager
    def _noted(self, call: str, block: int | None = None) -> Iterator[None]:
        name = f"experts {call}" if block is None else f"experts {call}, step {block}"
        observer = self._observer
        with (
            named_range(name, layer=observer.layer),
            observer.compute(call, block=block),
            observer.kernels(),
        ):
            yield

    def _next(self, call: str) -> int:
        """The place of this call among those of its name: the block, as blocks run in order."""
        self._calls[call] = self._calls.get(call, -1) + 1
        return self._calls[call]
