"""Kernels that take their time."""

from __future__ import annotations

import time
from typing import Any


class SlowMlp:
    """``mlp`` on a device that takes ``seconds`` for each of its products, without the host's
    cores."""

    def __init__(self, mlp: Any, seconds: float) -> None:
        self._mlp, self._seconds = mlp, seconds

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name != "row_sum":
                time.sleep(self._seconds)
            return getattr(self._mlp, name)(*args, **kwargs)

        return call
