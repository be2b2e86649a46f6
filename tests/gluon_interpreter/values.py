"""Tensors and scalars of a kernel: numpy arrays with Triton's types and rules.

Integers are computed exactly and then have to fit; bf16 takes no arithmetic, which a GPU would do
in other ways than numpy. A scalar integer is a Python int.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.language import SliceLayout

from gluon_interpreter.dtypes import FLOATS, REGISTERS, cast, scalar
from gluon_interpreter.source import fault


class Value:
    """``memory``: of a pointer, the tensor that it points into; ``data`` counts its elements."""

    def __init__(self, data: Any, dtype: Any, layout: Any = None, memory: Any = None) -> None:
        self.data, self.dtype, self.layout, self.memory = data, dtype, layout, memory

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape if isinstance(self.data, np.ndarray) else ()

    @property
    def is_pointer(self) -> bool:
        return self.memory is not None

    def _like(self, data: Any, layout: Any = None) -> Value:
        return Value(data, self.dtype, layout, self.memory)

    def __bool__(self) -> bool:
        if self.shape:
            raise fault("a tensor is used as a condition")
        return bool(self.data)

    def __index__(self) -> int:
        if self.shape or self.dtype.name not in REGISTERS or not isinstance(self.data, int):
            raise fault(f"a {self.dtype} of shape {self.shape} is used as an index")
        return int(self.data)

    def __getitem__(self, key: Any) -> Value:
        value = self
        for axis, part in enumerate(key if isinstance(key, tuple) else (key,)):
            if part is None:
                value = value.expand_dims(axis)
            elif part != slice(None):
                raise fault(f"tensors take : and None in brackets, not {part}")
        return value

    def expand_dims(self, axis: int) -> Value:
        layout = self.layout
        if isinstance(layout, SliceLayout):
            if layout.dim != axis:
                raise fault(f"a tensor of SliceLayout({layout.dim}) gets a new axis {axis}")
            layout = layout.parent
        return self._like(np.expand_dims(self.data, axis), layout)

    def to(self, dtype: Any, bitcast: bool = False) -> Value:
        if bitcast:
            raise fault("bit casts are not emulated")
        dtype = unwrap(dtype)
        return Value(cast(self.data, self.dtype, dtype), dtype, self.layout)

    def reshape(self, *shape: Any) -> Value:
        return self._like(np.reshape(self.data, as_shape(shape)))

    def permute(self, *order: Any) -> Value:
        return self._like(np.transpose(self.data, as_shape(order)))

    def split(self) -> tuple[Value, Value]:
        if self.shape[-1:] != (2,):
            raise fault(f"split takes a last axis of 2, not a tensor of {self.shape}")
        return self._like(self.data[..., 0]), self._like(self.data[..., 1])

    def __neg__(self) -> Value:
        if self.dtype.name in FLOATS:
            return self._like(-self.data, self.layout)
        return arithmetic("-", 0, self)


def unwrap(x: Any) -> Any:
    return x.value if isinstance(x, gl.constexpr) else x


def as_shape(shape: Any) -> tuple[int, ...]:
    if len(shape) == 1 and isinstance(shape[0], list | tuple):
        shape = shape[0]
    return tuple(int(unwrap(n)) for n in shape)


def as_value(x: Any) -> Value:
    """A Python number as Triton types it."""
    if isinstance(x, Value):
        return x
    if isinstance(x, bool):
        return Value(x, gl.int1)
    if isinstance(x, int):
        return Value(x, gl.int32 if -(2**31) <= x < 2**31 else gl.int64)
    if isinstance(x, float):
        return Value(np.float32(x), gl.float32)
    raise fault(f"{type(x).__name__} is no tensor and no number")


def common_type(a: Any, b: Any) -> Any:
    """Triton's promotion (`TritonSemantic.computation_type_impl`); Python numbers give way."""
    if not isinstance(a, Value) or not isinstance(b, Value):
        value, number = (a, b) if isinstance(a, Value) else (b, a)
        if isinstance(number, float) and value.dtype.name not in FLOATS:
            return gl.float32
        if value.dtype.name == "int1" and not isinstance(number, bool):
            return as_value(number).dtype
        return value.dtype
    if a.dtype == b.dtype:
        return a.dtype
    x, y = sorted((a.dtype, b.dtype), key=lambda t: (t.name in FLOATS, t.primitive_bitwidth))
    if x.name in FLOATS and x.primitive_bitwidth == y.primitive_bitwidth:
        return gl.float32
    if x.primitive_bitwidth == y.primitive_bitwidth and "uint" in x.name:
        return x
    return y


def same_rank(*values: Value) -> None:
    ranks = {len(v.shape) for v in values if v.shape}
    if len(ranks) > 1:
        raise fault(f"shapes {[v.shape for v in values]} have different ranks")


def operands(a: Any, b: Any) -> tuple[Any, Any, Any, Any]:
    """Both as data of their common type, that type and a layout."""
    x, y = as_value(a), as_value(b)
    if x.is_pointer or y.is_pointer:
        raise fault("pointers are only added to")
    dtype = common_type(a, b)
    same_rank(x, y)
    layout = x.layout if x.layout is not None else y.layout
    return cast(x.data, x.dtype, dtype), cast(y.data, y.dtype, dtype), dtype, layout


def in_range(result: Any, dtype: Any, words: str) -> Any:
    """An integer result that was computed in more bits."""
    bounds = np.iinfo(REGISTERS[dtype.name])
    low, high = (result, result) if isinstance(result, int) else (result.min(), result.max())
    if low < bounds.min or high > bounds.max:
        raise fault(f"{words} overflows {dtype}: {low} to {high}")
    return result if isinstance(result, int) else result.astype(REGISTERS[dtype.name])


# Of integers, "//" and "%" are C's.
ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": lambda x, y: (x - remainder(x, y)) // y,
    "%": lambda x, y: remainder(x, y),
}
BITWISE: dict[str, Callable[[Any, Any], Any]] = {
    "&": operator.and_,
    "|": operator.or_,
    "^": operator.xor,
    "<<": operator.lshift,
    ">>": operator.rshift,
}


def remainder(x: Any, y: Any) -> Any:
    """It has the sign of the dividend."""
    if np.any(np.equal(y, 0)):
        raise fault("integer division by zero")
    return scalar(np.fmod(x, y))


def arithmetic(name: str, a: Any, b: Any) -> Value:
    for pointer, offset in ((a, b), (b, a)):
        if isinstance(pointer, Value) and pointer.is_pointer:
            return move(pointer, as_value(offset), backwards=name == "-")
    x, y, dtype, layout = operands(a, b)
    if dtype.name in FLOATS:
        if dtype.name == "bf16":
            raise fault(f"{name} of bf16 is not emulated: cast to float32 first")
        return Value(ARITHMETIC[name](x, y), dtype, layout)
    if dtype.name == "int1":
        raise fault(f"{name} of booleans")
    return Value(in_range(ARITHMETIC[name](wide(x), wide(y)), dtype, name), dtype, layout)


def wide(data: Any) -> Any:
    return data if isinstance(data, int) or data.dtype.itemsize == 8 else data.astype(np.int64)


def move(pointer: Value, offset: Value, *, backwards: bool) -> Value:
    if offset.is_pointer or offset.dtype.name in FLOATS:
        raise fault(f"a pointer moves by integers, not by {offset.dtype}")
    same_rank(pointer, offset)
    steps = -wide(offset.data) if backwards else wide(offset.data)
    layout = pointer.layout if pointer.layout is not None else offset.layout
    return Value(pointer.data + steps, pointer.dtype, layout, pointer.memory)


def divide(a: Any, b: Any) -> Value:
    """Of integers in fp32."""
    x, y, dtype, layout = operands(a, b)
    if dtype.name == "bf16":
        raise fault("/ of bf16 is not emulated: cast to float32 first")
    if dtype.name not in FLOATS:
        x, y, dtype = np.float32(x), np.float32(y), gl.float32
    return Value(np.true_divide(x, y), dtype, layout)


def bitwise(name: str, a: Any, b: Any) -> Value:
    x, y, dtype, layout = operands(a, b)
    if dtype.name in FLOATS:
        raise fault(f"{name} of {dtype}")
    if dtype.name == "int1":
        return Value(BITWISE[name](x, y), dtype, layout)
    return Value(in_range(BITWISE[name](wide(x), wide(y)), dtype, name), dtype, layout)


def compare(function: Callable[[Any, Any], Any], a: Any, b: Any) -> Value:
    x, y, _, layout = operands(a, b)
    return Value(scalar(function(x, y)), gl.int1, layout)


def _operator(method: str, apply: Callable[[Any, Any], Value]) -> None:
    setattr(Value, f"__{method}__", lambda self, other: apply(self, unwrap(other)))
    setattr(Value, f"__r{method}__", lambda self, other: apply(unwrap(other), self))


for _method, _name in (("add", "+"), ("sub", "-"), ("mul", "*"), ("floordiv", "//"), ("mod", "%")):
    _operator(_method, partial(arithmetic, _name))
for _method, _name in (("and", "&"), ("or", "|"), ("xor", "^"), ("lshift", "<<"), ("rshift", ">>")):
    _operator(_method, partial(bitwise, _name))
_operator("truediv", divide)
# Python swaps the operands of comparisons itself.
for _method in ("lt", "le", "gt", "ge", "eq", "ne"):
    _operator(_method, partial(compare, getattr(operator, _method)))
