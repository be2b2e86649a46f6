"""`gluon.language`: what kernels do with tensors, besides operators."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton.experimental.gluon.language as gl

from gluon_interpreter.dtypes import INTEGERS, REGISTERS, cast, scalar
from gluon_interpreter.partitions import current
from gluon_interpreter.shared_memory import check_rank
from gluon_interpreter.source import fault
from gluon_interpreter.values import (
    Value,
    as_shape,
    as_value,
    in_range,
    operands,
    same_rank,
    unwrap,
)


def program_id(axis: Any) -> Value:
    return Value(current().program.index[int(unwrap(axis))], gl.int32)


def num_programs(axis: Any) -> Value:
    return Value(current().program.grid[int(unwrap(axis))], gl.int32)


def num_warps() -> int:
    return current().num_warps


def arange(start: Any, end: Any, layout: Any = None) -> Value:
    numbers = np.arange(int(unwrap(start)), int(unwrap(end)), dtype=np.int32)
    check_rank(unwrap(layout), numbers.shape)
    return Value(numbers, gl.int32, unwrap(layout))


def full(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Value:
    shape, dtype, layout = as_shape((unwrap(shape),)), unwrap(dtype), unwrap(layout)
    check_rank(layout, shape)
    number = as_value(unwrap(value))
    data = np.full(shape, cast(number.data, number.dtype, dtype), REGISTERS[dtype.name])
    return Value(data, dtype, layout)


def zeros(shape: Any, dtype: Any, layout: Any = None) -> Value:
    return full(shape, 0, dtype, layout)


def convert_layout(value: Value, layout: Any, assert_trivial: Any = False) -> Value:
    check_rank(unwrap(layout), value.shape)
    return Value(value.data, value.dtype, unwrap(layout), value.memory)


def where(condition: Any, x: Any, y: Any) -> Value:
    chosen = as_value(unwrap(condition))
    if not any(isinstance(v, Value) for v in (x, y)):
        x = as_value(unwrap(x))
    a, b, dtype, layout = operands(unwrap(x), unwrap(y))
    same_rank(chosen, as_value(unwrap(x)), as_value(unwrap(y)))
    return Value(scalar(np.where(chosen.data, a, b).astype(REGISTERS[dtype.name])), dtype, layout)


def maximum(x: Any, y: Any, propagate_nan: Any = None) -> Value:
    """Of a NaN and a number the number, as PTX max."""
    a, b, dtype, layout = operands(unwrap(x), unwrap(y))
    return Value(scalar(np.fmax(a, b)), dtype, layout)


def _of_floats(name: str, function: Callable[[Any], Any]) -> Callable[[Any], Value]:
    def apply(x: Any) -> Value:
        value = as_value(unwrap(x))
        if value.dtype.name not in ("fp32", "fp64"):
            raise fault(f"{name} of {value.dtype}: cast to float32 first")
        return Value(function(value.data), value.dtype, value.layout)

    return apply


def _erf(x: Any) -> Any:
    return torch.erf(torch.as_tensor(x)).numpy()[()]


def total(x: Value, axis: Any = None, keep_dims: Any = False) -> Value:
    """`gl.sum`"""
    if x.dtype.name not in ("fp32", "fp64", "int32", "int64"):
        raise fault(f"sum of {x.dtype}: cast to float32 or int32 first")
    axis = tuple(range(len(x.shape))) if axis is None else int(unwrap(axis))
    result = scalar(np.add.reduce(x.data, axis=axis, keepdims=bool(keep_dims)))
    if x.dtype.name in INTEGERS:
        result = in_range(result, x.dtype, "sum")
    known = isinstance(axis, int) and x.layout is not None
    return Value(result, x.dtype, gl.SliceLayout(axis, x.layout) if known else None)


def static_assert(condition: Any, message: Any = "") -> None:
    if not unwrap(condition):
        raise fault(f"static_assert: {unwrap(message)}")


def run_time_range(*bounds: Any, **options: Any) -> Iterator[Value]:
    """``range`` in a kernel counts in int32."""
    values = [as_value(unwrap(bound)) for bound in bounds]
    dtype = gl.int64 if any(v.dtype.name == "int64" for v in values) else gl.int32
    for i in range(*(operator.index(v) for v in values)):
        yield Value(i, dtype)


def static_range(*bounds: Any, **options: Any) -> range:
    return range(*(int(unwrap(bound)) for bound in bounds))


LANGUAGE: dict[str, Callable[..., Any]] = {
    "program_id": program_id,
    "num_programs": num_programs,
    "num_warps": num_warps,
    "arange": arange,
    "full": full,
    "zeros": zeros,
    "convert_layout": convert_layout,
    "where": where,
    "maximum": maximum,
    "exp": _of_floats("exp", np.exp),
    "erf": _of_floats("erf", _erf),
    "sum": total,
    "split": lambda x: x.split(),
    "reshape": lambda x, *shape: x.reshape(*shape),
    "permute": lambda x, *order: x.permute(*order),
    "static_assert": static_assert,
    "constexpr": unwrap,
    "range": run_time_range,
    "static_range": static_range,
}
