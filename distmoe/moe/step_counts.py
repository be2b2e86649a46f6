"""Top-k pairs and tokens of one layer in the optimizer step so far: integers, on the device."""

from __future__ import annotations

from torch import Tensor


class StepCounts:
    """[E + 1] int64, pairs per expert and tokens of this rank, added up over forwards.

    Forwards belong together from one ``begin`` to the next. A layer whose user never calls it has
    a loss of every forward by itself; what is to be taken is added up all the same.
    """

    def __init__(self) -> None:
        self._begun = False
        self._so_far_E1: Tensor | None = None

    def begin(self) -> None:
        """Forget what was counted: the forwards from here on are of one step."""
        self._begun = True
        self._so_far_E1 = None

    def add(self, own_E1: Tensor) -> Tensor:
        """Count a forward; the counts that its loss is to use."""
        before_E1 = self._so_far_E1
        self._so_far_E1 = own_E1 if before_E1 is None else before_E1 + own_E1
        return self.so_far(own_E1)

    def so_far(self, own_E1: Tensor) -> Tensor:
        """The counts that the loss of a forward is to use which was counted before."""
        if self._so_far_E1 is None or not self._begun:
            return own_E1
        return self._so_far_E1

    def take(self) -> Tensor | None:
        """What was counted, and begin anew; None if nothing was."""
        counted_E1, self._so_far_E1 = self._so_far_E1, None
        return counted_E1
