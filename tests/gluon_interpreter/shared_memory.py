"""Shared memory: allocations of raw elements, views of them, and who used which part."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gluon_interpreter.global_memory import POISON, STORAGE, to_registers, to_storage
from gluon_interpreter.partitions import current
from gluon_interpreter.races import Access, Box, History
from gluon_interpreter.source import fault, line
from gluon_interpreter.values import Value, as_shape, as_value, unwrap


class Allocation:
    def __init__(self, dtype: Any, shape: tuple[int, ...]) -> None:
        self.name = line().assigned
        self.array = np.full(shape, POISON[dtype.name], STORAGE[dtype.name])
        self.history = History(self.name)
        # Box of one element -> its state, where the elements are barriers.
        self.barriers: dict[Box, Any] = {}


class ViewType:
    """What ``buffer.type`` tells."""

    def __init__(self, view: View) -> None:
        self.element_ty, self.shape, self.layout = view.dtype, list(view.shape), view.layout
        self.nbytes_per_cta = view.nbytes_per_cta


class View:
    """A shared_memory_descriptor. ``box``: the part of the allocation that it lies in.

    ``axes``: the allocation's axis of each of its own; None after a reshape.
    """

    def __init__(
        self, home: Allocation, array: Any, dtype: Any, layout: Any, box: Box, axes: Any
    ) -> None:
        self.home, self.array, self.dtype, self.layout = home, array, dtype, layout
        self.box, self.axes = box, axes

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def rank(self) -> int:
        return int(self.array.ndim)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes_per_cta(self) -> int:
        return self.numel * self.dtype.primitive_bitwidth // 8

    @property
    def type(self) -> ViewType:
        return ViewType(self)

    def index(self, index: Any) -> View:
        number = int(unwrap(index))
        if not 0 <= number < self.shape[0]:
            raise fault(f"index {number} of a buffer of {self.shape}")
        part = self.slice(number, 1)
        axes = None if part.axes is None else part.axes[1:]
        return View(self.home, part.array[0], self.dtype, self.layout, part.box, axes)

    def slice(self, start: Any, length: Any, dim: Any = 0) -> View:
        start, length, dim = int(unwrap(start)), int(unwrap(length)), int(unwrap(dim))
        if start < 0 or start + length > self.shape[dim]:
            raise fault(f"slice {start} to {start + length} of axis {dim} of {self.shape}")
        part = (slice(None),) * dim + (slice(start, start + length),)
        box = self.box
        if self.axes is not None:
            axis = self.axes[dim]
            low = box[axis][0] + start
            box = (*box[:axis], (low, low + length), *box[axis + 1 :])
        return View(self.home, self.array[part], self.dtype, self.layout, box, self.axes)

    def permute(self, order: Any) -> View:
        order = as_shape(order)
        axes = None if self.axes is None else [self.axes[i] for i in order]
        return View(self.home, self.array.transpose(order), self.dtype, self.layout, self.box, axes)

    def reshape(self, shape: Any) -> View:
        array = self.array.view()
        array.shape = as_shape(shape)
        return View(self.home, array, self.dtype, self.layout, self.box, None)

    def reinterpret(self, dtype: Any = None, shape: Any = None, layout: Any = None) -> View:
        """The same bytes, or the first of them, as something else."""
        dtype = unwrap(dtype) or self.dtype
        shape = self.shape if shape is None else as_shape(shape)
        flat = self.array.view()
        flat.shape = (-1,)
        flat = flat.view(STORAGE[dtype.name])
        if math.prod(shape) > flat.size:
            raise fault(f"a buffer of {self.shape} {self.dtype} is too small for {shape} {dtype}")
        array = flat[: math.prod(shape)].reshape(shape)
        return View(self.home, array, dtype, unwrap(layout) or self.layout, self.box, None)

    _reinterpret = reinterpret

    def _keep_alive(self) -> None:
        """Says until when the compiler has to keep the memory."""

    def access(self, what: str, *, write: bool, generic: bool, over: bool) -> Access:
        """Note an access by this partition, which conflicts with nothing.

        ``over``: it has happened when this returns; otherwise it is in flight.
        """
        partition = current()
        done = [partition.now] if over else []
        access = Access(what, line(), self.box, write, generic, done)
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
        self.array[...] = to_storage(value.data, self.dtype)

    def poison(self) -> None:
        self.array[...] = POISON[self.dtype.name]


def allocate_shared_memory(element_ty: Any, shape: Any, layout: Any, value: Any = None) -> View:
    dtype, shape, layout = unwrap(element_ty), as_shape(shape), unwrap(layout)
    home = Allocation(dtype, shape)
    box = tuple((0, n) for n in shape)
    view = View(home, home.array, dtype, layout, box, list(range(len(shape))))
    if value is not None:
        view.store(value)
    return view


def check_rank(layout: Any, shape: tuple[int, ...]) -> None:
    rank = getattr(layout, "rank", None)
    if isinstance(rank, int) and rank != len(shape):
        raise fault(f"a layout of rank {rank} for a tensor of {shape}")


def check_descriptor(view: Any, what: str) -> None:
    if not isinstance(view, View):
        raise fault(f"{what} is {type(view).__name__}, not shared memory")
