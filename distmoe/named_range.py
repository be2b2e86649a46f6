"""Names of phases and layers in the profiles of torch.profiler."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch.autograd import profiler

_NOTHING = nullcontext()


def is_profiling() -> bool:
    """Whether torch.profiler, or its ranges for nsys, is on in this process."""
    return profiler._is_profiler_enabled


def named_range(name: str, *, layer: str = "") -> AbstractContextManager[object]:
    """Put around work that a profile should show as "LAYER: NAME"; costs nothing while none is
    made."""
    if not is_profiling():
        return _NOTHING
    return profiler.record_function(f"{layer}: {name}" if layer else name)
