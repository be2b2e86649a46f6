"""What Triton 3.6 and 3.9 call differently in Gluon, so that every kernel is written once."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

_NEW_NAMES = hasattr(tma, "async_load")
_NEW_VIEW: gl.constexpr = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

# (descriptor, coordinates, barrier, shared): the barrier counts the bytes as they land.
tma_load = tma.async_load if _NEW_NAMES else tma.async_copy_global_to_shared
# (shared, pointers, mask): what the mask leaves out becomes zero.
copy_async = async_copy.async_load if _NEW_NAMES else async_copy.async_copy_global_to_shared


@gluon.jit
def viewed(shared, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The same shared memory in another shape."""
    if _NEW_VIEW:
        view = shared.reinterpret(shared.dtype, SHAPE, LAYOUT)
    else:
        view = shared._reinterpret(shared.dtype, SHAPE, LAYOUT)
    return view
