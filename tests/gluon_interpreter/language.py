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
    arithmetic,
    as_shape,
    as_value,
    divide,
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


def num_ctas() -> int:
    return 1


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


def full_like(
    x: Value, value: Any, shape: Any = None, dtype: Any = None, layout: Any = None
) -> Value:
    return full(shape or x.shape, value, dtype or x.dtype, layout or x.layout)


def zeros_like(x: Value, shape: Any = None, dtype: Any = None, layout: Any = None) -> Value:
    return full_like(x, 0, shape, dtype, layout)


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


def maximum(x: Any, y: Any, propagate_nan: Any = None) -> Any:
    """Of a NaN and a number the number, as PTX max."""
    return _extreme(max, np.fmax, unwrap(x), unwrap(y))


def minimum(x: Any, y: Any, propagate_nan: Any = None) -> Any:
    return _extreme(min, np.fmin, unwrap(x), unwrap(y))


def _extreme(of_numbers: Callable[..., Any], of_arrays: Callable[..., Any], x: Any, y: Any) -> Any:
    if not isinstance(x, Value) and not isinstance(y, Value):
        return of_numbers(x, y)
    a, b, dtype, layout = operands(x, y)
    return Value(scalar(of_arrays(a, b)), dtype, layout)


def cdiv(x: Any, y: Any) -> Any:
    x, y = unwrap(x), unwrap(y)
    if not isinstance(x, Value) and not isinstance(y, Value):
        return -(-x // y)
    return arithmetic("//", arithmetic("+", x, y) - 1, y)


def _of_floats(name: str, function: Callable[[Any], Any]) -> Callable[[Any], Value]:
    def apply(x: Any) -> Value:
        value = as_value(unwrap(x))
        if value.dtype.name not in ("fp32", "fp64"):
            raise fault(f"{name} of {value.dtype}: cast to float32 first")
        return Value(function(value.data), value.dtype, value.layout)

    return apply


def _erf(x: Any) -> Any:
    return torch.erf(torch.as_tensor(x)).numpy()[()]


def absolute(x: Any) -> Value:
    value = as_value(unwrap(x))
    return Value(np.abs(value.data), value.dtype, value.layout)


def fma(x: Any, y: Any, z: Any) -> Value:
    return arithmetic("+", arithmetic("*", x, y), z)


REDUCTIONS = {"sum": np.add, "max": np.fmax, "min": np.fmin}


def _reduction(name: str) -> Callable[..., Value]:
    def apply(x: Value, axis: Any = None, keep_dims: Any = False) -> Value:
        if name == "sum" and x.dtype.name not in ("fp32", "fp64", "int32", "int64"):
            raise fault(f"sum of {x.dtype}: cast to float32 or int32 first")
        axis = tuple(range(len(x.shape))) if axis is None else int(unwrap(axis))
        result = scalar(REDUCTIONS[name].reduce(x.data, axis=axis, keepdims=bool(keep_dims)))
        if x.dtype.name in INTEGERS:
            result = in_range(result, x.dtype, name)
        known = isinstance(axis, int) and x.layout is not None
        return Value(result, x.dtype, gl.SliceLayout(axis, x.layout) if known else None)

    return apply


def join(a: Value, b: Value) -> Value:
    x, y, dtype, _ = operands(a, b)
    return Value(np.stack(np.broadcast_arrays(x, y), axis=-1), dtype)


def static_assert(condition: Any, message: Any = "") -> None:
    if not unwrap(condition):
        raise fault(f"static_assert: {unwrap(message)}")


def device_assert(condition: Any, message: Any = "", mask: Any = None) -> None:
    wrong = np.logical_not(as_value(unwrap(condition)).data)
    if mask is not None:
        wrong = wrong & as_value(unwrap(mask)).data
    if np.any(wrong):
        raise fault(f"device_assert: {unwrap(message)}")


def assume(condition: Any) -> None:
    if not as_value(unwrap(condition)):
        raise fault("assume of something false")


def hint(x: Any, *unused: Any) -> Any:
    return x


def nothing(*unused: Any, **options: Any) -> None:
    """Printing, and barriers among the warps of a partition."""


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
    "num_ctas": num_ctas,
    "arange": arange,
    "full": full,
    "zeros": zeros,
    "full_like": full_like,
    "zeros_like": zeros_like,
    "convert_layout": convert_layout,
    "set_auto_layout": convert_layout,
    "where": where,
    "maximum": maximum,
    "minimum": minimum,
    "cdiv": cdiv,
    "fdiv": divide,
    "abs": absolute,
    "fma": fma,
    "exp": _of_floats("exp", np.exp),
    "exp2": _of_floats("exp2", np.exp2),
    "log": _of_floats("log", np.log),
    "log2": _of_floats("log2", np.log2),
    "sqrt": _of_floats("sqrt", np.sqrt),
    "rsqrt": _of_floats("rsqrt", lambda x: np.float32(1) / np.sqrt(x)),
    "erf": _of_floats("erf", _erf),
    "floor": _of_floats("floor", np.floor),
    "ceil": _of_floats("ceil", np.ceil),
    "sum": _reduction("sum"),
    "max": _reduction("max"),
    "min": _reduction("min"),
    "join": join,
    "split": lambda x: x.split(),
    "reshape": lambda x, *shape: x.reshape(*shape),
    "permute": lambda x, *order: x.permute(*order),
    "expand_dims": lambda x, axis: x.expand_dims(unwrap(axis)),
    "cast": lambda x, dtype, **options: as_value(unwrap(x)).to(dtype),
    "to_tensor": lambda x: as_value(unwrap(x)),
    "static_assert": static_assert,
    "device_assert": device_assert,
    "assume": assume,
    "multiple_of": hint,
    "max_contiguous": hint,
    "max_constancy": hint,
    "static_print": nothing,
    "device_print": nothing,
    "barrier": nothing,
    "thread_barrier": nothing,
    "debug_barrier": nothing,
    "constexpr": unwrap,
    "range": run_time_range,
    "static_range": static_range,
}
