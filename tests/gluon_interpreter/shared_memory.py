"""Shared memory: allocations of raw elements, views of them, and who used which part."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from triton.experimental.gluon.language import NVMMASharedLayout

from gluon_interpreter.dtypes import MEMORY, POISON, to_memory, to_registers
from gluon_interpreter.partitions import current
from gluon_interpreter.races import Access, History, Region
from gluon_interpreter.source import fault, line
from gluon_interpreter.values import Value, as_shape, as_value, unwrap


class Allocation:
    def __init__(self) -> None:
        self.history = History(current().program.timing)
        # Address -> state, where the elements are barriers.
        self.barriers: dict[int, Any] = {}


class View:
    """A shared_memory_descriptor: ``array``, a view of the memory of ``home``."""

    def __init__(self, home: Allocation, name: str, array: Any, dtype: Any, layout: Any) -> None:
        self.home, self.name, self.array = home, name, array
        self.dtype, self.layout = dtype, layout

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes_per_cta(self) -> int:
        return self.numel * self.dtype.primitive_bitwidth // 8

    @property
    def region(self) -> Region:
        return Region(self.name, self.array)

    def _part(self, name: str, array: Any) -> View:
        return View(self.home, name, array, self.dtype, self.layout)

    def index(self, index: Any) -> View:
        number = int(unwrap(index))
        if not 0 <= number < self.shape[0]:
            raise fault(f"index {number} of {self.name}, which has {self.shape[0]}")
        return self._part(f"{self.name}[{number}]", self.array[number, ...])

    def permute(self, order: Any) -> View:
        return self._part(self.name, self.array.transpose(as_shape(order)))

    def reinterpret(self, dtype: Any = None, shape: Any = None, layout: Any = None) -> View:
        """The same bytes, or the first of them, as something else."""
        dtype = self.dtype if dtype is None else unwrap(dtype)
        shape = self.shape if shape is None else as_shape(shape)
        flat = in_place(self.array, (-1,)).view(MEMORY[dtype.name])
        if math.prod(shape) > flat.size:
            raise fault(
                f"{self.name} of {self.shape} {self.dtype} is too small for {shape} {dtype}"
            )
        layout = self.layout if layout is None else unwrap(layout)
        if dtype == self.dtype and not same_places(self.shape, self.layout, shape, layout):
            raise fault(
                f"elements of {self.name} of {self.shape} change places as {shape}: {self.layout} "
                f"and {layout}"
            )
        array = flat[: math.prod(shape)].reshape(shape)
        return View(self.home, self.name, array, dtype, layout)

    _reinterpret = reinterpret

    def _keep_alive(self) -> None:
        """Says until when the compiler has to keep the memory."""

    def access(self, what: str, *, write: bool, generic: bool, over: bool) -> Access:
        """Note an access by this partition, which conflicts with nothing.

        ``over``: it has happened when this returns; otherwise it is in flight.
        """
        partition = current()
        done = [partition.now] if over else []
        access = Access(what, line(), self.region, write, generic, done)
        self.home.history.add(access, partition.known)
        return access

    def load(self, layout: Any = None) -> Value:
        layout = unwrap(layout)
        check_rank(layout, self.shape)
        self.access("load", write=False, generic=True, over=True)
        return Value(to_registers(self.array.copy(), self.dtype), self.dtype, layout)

    def store(self, value: Any) -> None:
        value = as_value(value)
        if value.shape != self.shape or value.dtype != self.dtype:
            raise fault(
                f"a tensor of {value.shape} {value.dtype} is stored in a buffer of {self.shape} "
                f"{self.dtype}"
            )
        self.access("store", write=True, generic=True, over=True)
        self.array[...] = to_memory(value.data, self.dtype)

    def poison(self) -> None:
        self.array[...] = POISON[self.dtype.name]


def allocate_shared_memory(element_ty: Any, shape: Any, layout: Any, value: Any = None) -> View:
    dtype, shape, layout = unwrap(element_ty), as_shape(shape), unwrap(layout)
    check_rank(layout, shape, or_stages=True)
    array = np.full(shape, POISON[dtype.name], MEMORY[dtype.name])
    view = View(Allocation(), line().assigned, array, dtype, layout)
    if value is not None:
        view.store(value)
    return view


def same_places(
    shape: tuple[int, ...], layout: Any, new_shape: tuple[int, ...], new_layout: Any
) -> bool:
    """Whether a reinterpreted buffer is what a reshaped one would be.

    Tiles of the layout's rank, their outer axes taken as rows, lie one behind the other, and of a
    tile first all rows of the first 128 columns in bytes (the swizzle's width), then those of the
    next. The swizzle repeats every 8 rows.
    """
    both = isinstance(layout, NVMMASharedLayout) and isinstance(new_layout, NVMMASharedLayout)
    if not both or layout.transposed:
        return bool(layout == new_layout and shape[1:] == new_shape[1:])
    rows, cols = math.prod(shape[-layout.rank : -1]), shape[-1]
    new_rows, new_cols = math.prod(new_shape[-new_layout.rank : -1]), new_shape[-1]
    if replace(layout, rank=2) != replace(new_layout, rank=2) or cols != new_cols:
        return False
    width = max(16, layout.swizzle_byte_width) * 8 // layout.element_bitwidth
    return rows == new_rows or (cols <= width and rows % 8 == new_rows % 8 == 0)


def in_place(array: Any, shape: tuple[int, ...]) -> Any:
    """Reshape that refuses to copy."""
    view = array.view()
    view.shape = shape
    return view


def check_rank(layout: Any, shape: tuple[int, ...], or_stages: bool = False) -> None:
    """``or_stages``: the tensor may have one more axis in front."""
    rank = getattr(layout, "rank", None)
    if isinstance(rank, int) and len(shape) - rank not in (0, int(or_stages)):
        raise fault(f"a layout of rank {rank} for a tensor of {shape}")


def check_descriptor(view: Any, what: str) -> None:
    if not isinstance(view, View):
        raise fault(f"{what} is {type(view).__name__}, not shared memory")
