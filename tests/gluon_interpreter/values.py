"""Tensors and scalars of a kernel: numpy arrays with Triton's types and rules.

A scalar integer is a Python int. bf16 is kept in fp32, which it never leaves unrounded.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.language import SliceLayout

from gluon_interpreter.source import fault

# Triton's name of a type -> numpy's, in registers.
NUMPY = {
    "int1": np.dtype(np.bool_),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(np.float32),
    "fp32": np.dtype(np.float32),
    "fp64": np.dtype(np.float64),
} | {
    f"{kind}{bits}": np.dtype(f"{kind}{bits}")
    for kind in ("int", "uint")
    for bits in (8, 16, 32, 64)
}
FLOATS = ["fp16", "bf16", "fp32", "fp64"]


class ElementType:
    """What ``x.type`` tells of a tensor."""

    def __init__(self, value: Value) -> None:
        self.element_ty = self.scalar = value.dtype
        self.shape, self.layout = list(value.shape), value.layout


class Value:
    """``memory``: of a pointer, the tensor that it points into; ``data`` counts its elements."""

    def __init__(self, data: Any, dtype: Any, layout: Any = None, memory: Any = None) -> None:
        self.data, self.dtype, self.layout, self.memory = data, dtype, layout, memory

    @property
    def shape(self) -> tuple[int, ...]:
        return np.shape(self.data)

    @property
    def type(self) -> ElementType:
        return ElementType(self)

    @property
    def T(self) -> Value:
        return self.permute(1, 0)

    def _like(self, data: Any, layout: Any = None) -> Value:
        return Value(data, self.dtype, layout, self.memory)

    def __bool__(self) -> bool:
        if self.shape:
            raise fault("a tensor is used as a condition")
        return bool(self.data)

    def __index__(self) -> int:
        if self.shape or self.dtype.name not in NUMPY or not isinstance(self.data, int):
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

    trans = permute

    def split(self) -> tuple[Value, Value]:
        if self.shape[-1:] != (2,):
            raise fault(f"split takes a last axis of 2, not a tensor of {self.shape}")
        return self._like(self.data[..., 0]), self._like(self.data[..., 1])

    def __neg__(self) -> Value:
        if self.dtype.name == "bf16":
            return self._like(-self.data, self.layout)
        return arithmetic("-", operator.sub, 0, self)

    def __invert__(self) -> Value:
        return self._like(not self.data if isinstance(self.data, bool) else ~self.data, self.layout)


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


def round_to_bfloat16(x: Any) -> Any:
    """fp32 -> fp32 with 8 bits of precision, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), np.float32("nan"), rounded.view(np.float32).reshape(np.shape(x)))[
        ()
    ]


def cast(data: Any, source: Any, target: Any) -> Any:
    if source == target:
        return data
    if source.name not in NUMPY or target.name not in NUMPY:
        raise fault(f"cannot cast {source} to {target}")
    kind = NUMPY[target.name]
    if target.name == "int1":
        converted = np.not_equal(data, 0)
    else:
        converted = np.asarray(data).astype(kind)
    if target.name == "bf16":
        return round_to_bfloat16(converted)
    return scalar(converted)


def scalar(data: Any) -> Any:
    """0-d arrays of integers as Python numbers, which are faster and exact."""
    if isinstance(data, int) or np.ndim(data):
        return data
    return data.item() if data.dtype.kind in "biu" else data[()]


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
    dtype = common_type(a, b)
    x, y = as_value(a), as_value(b)
    same_rank(x, y)
    layout = x.layout if x.layout is not None else y.layout
    return cast(x.data, x.dtype, dtype), cast(y.data, y.dtype, dtype), dtype, layout


def in_range(result: Any, dtype: Any, words: str) -> Any:
    """An integer result that was computed in more bits."""
    bounds = np.iinfo(NUMPY[dtype.name])
    low, high = (result, result) if isinstance(result, int) else (result.min(), result.max())
    if low < bounds.min or high > bounds.max:
        raise fault(f"{words} overflows {dtype}: {low} to {high}")
    return result if isinstance(result, int) else result.astype(NUMPY[dtype.name])


def arithmetic(name: str, function: Callable[[Any, Any], Any], a: Any, b: Any) -> Value:
    for pointer, offset, sign in ((a, b, 1), (b, a, 1)):
        if isinstance(pointer, Value) and pointer.memory is not None:
            return move(pointer, as_value(offset), -1 if name == "-" else sign)
    x, y, dtype, layout = operands(a, b)
    if dtype.name == "bf16":
        raise fault(f"{name} of bf16 tensors is not emulated: cast to float32 first")
    if dtype.name in FLOATS:
        return Value(function(x, y), dtype, layout)
    if dtype.name == "int1":
        raise fault(f"{name} of booleans")
    wide = [
        v if isinstance(v, int) or dtype.name == "uint64" else v.astype(np.int64) for v in (x, y)
    ]
    return Value(in_range(function(*wide), dtype, f"{name}"), dtype, layout)


def move(pointer: Value, offset: Value, sign: int) -> Value:
    if offset.memory is not None or offset.dtype.name in FLOATS:
        raise fault(f"a pointer moves by integers, not by {offset.dtype}")
    same_rank(pointer, offset)
    steps = offset.data if isinstance(offset.data, int) else offset.data.astype(np.int64)
    layout = pointer.layout if pointer.layout is not None else offset.layout
    return Value(pointer.data + sign * steps, pointer.dtype, layout, pointer.memory)


def divide(a: Any, b: Any) -> Value:
    x, y, dtype, layout = operands(a, b)
    if dtype.name == "bf16":
        raise fault("/ of bf16 tensors is not emulated: cast to float32 first")
    if dtype.name not in FLOATS:
        x, y, dtype = np.float32(x), np.float32(y), gl.float32
    return Value(np.true_divide(x, y), dtype, layout)


def remainder(x: Any, y: Any) -> Any:
    """C's: it has the sign of the dividend."""
    if np.any(np.equal(y, 0)):
        raise fault("integer division by zero")
    return scalar(np.fmod(x, y))


def quotient(x: Any, y: Any) -> Any:
    return (x - remainder(x, y)) // y


def compare(function: Callable[[Any, Any], Any], a: Any, b: Any) -> Value:
    if any(isinstance(v, Value) and v.memory is not None for v in (a, b)):
        raise fault("comparisons of pointers are not emulated")
    x, y, _, layout = operands(a, b)
    return Value(scalar(function(x, y)), gl.int1, layout)


def bitwise(name: str, function: Callable[[Any, Any], Any], a: Any, b: Any) -> Value:
    x, y, dtype, layout = operands(a, b)
    if dtype.name in FLOATS:
        raise fault(f"{name} of {dtype}")
    if name in ("<<", ">>") and not isinstance(x, int):
        x = x.astype(np.int64)
    result = function(x, y)
    return Value(result if dtype.name == "int1" else in_range(result, dtype, name), dtype, layout)


def _add_operator(method: str, apply: Callable[[Any, Any], Value]) -> None:
    setattr(Value, f"__{method}__", lambda self, other: apply(self, unwrap(other)))
    setattr(Value, f"__r{method}__", lambda self, other: apply(unwrap(other), self))


def _add_operators() -> None:
    def take(apply: Callable[..., Value], *fixed: Any) -> Callable[[Any, Any], Value]:
        return lambda a, b: apply(*fixed, a, b)

    for method, name, function in (
        ("add", "+", operator.add),
        ("sub", "-", operator.sub),
        ("mul", "*", operator.mul),
        ("floordiv", "//", quotient),
        ("mod", "%", remainder),
    ):
        _add_operator(method, take(arithmetic, name, function))
    for method, name in (
        ("and", "&"),
        ("or", "|"),
        ("xor", "^"),
        ("lshift", "<<"),
        ("rshift", ">>"),
    ):
        function = getattr(operator, f"__{method}__")
        _add_operator(method, take(bitwise, name, function))
    _add_operator("truediv", divide)
    for method in ("lt", "le", "gt", "ge", "eq", "ne"):
        function = take(compare, getattr(operator, method))
        setattr(Value, f"__{method}__", lambda self, other, f=function: f(self, unwrap(other)))


_add_operators()
