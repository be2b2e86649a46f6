"""The rows of a pass, with every call under a name in profiles."""

from __future__ import annotations

from torch import Tensor

from distmoe.moe.rows import Rows
from distmoe.named_range import named_range


class NamedRows:
    """``rows`` of one pass of ``layer``; a step is the block that is waited for or sent home."""

    def __init__(self, rows: Rows, layer: str) -> None:
        self._rows, self._layer = rows, layer
        self.rows_RH, self.home_UH = rows.rows_RH, rows.home_UH

    def wait_for(self, i: int) -> None:
        with named_range(f"dispatch, step {i}", layer=self._layer):
            self._rows.wait_for(i)

    def send_home(self, i: int, y_RH: Tensor) -> None:
        with named_range(f"combine, step {i}", layer=self._layer):
            self._rows.send_home(i, y_RH)

    def send_rest(self) -> None:
        with named_range("combine, what is passed on", layer=self._layer):
            self._rows.send_rest()

    def finish(self, y_RH: Tensor) -> None:
        self._rows.finish(y_RH)
