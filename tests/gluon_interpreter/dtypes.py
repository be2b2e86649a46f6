"""Triton's types of elements as numpy's, in registers and in memory.

bf16, which numpy lacks, is fp32 in registers, rounded, and the upper half of fp32's bits in memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.experimental.gluon.language as gl

from gluon_interpreter.source import fault

FLOATS = {
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(np.float32),
    "fp32": np.dtype(np.float32),
    "fp64": np.dtype(np.float64),
}
INTEGERS = {
    f"{kind}{bits}": np.dtype(f"{kind}{bits}")
    for kind in ("int", "uint")
    for bits in (8, 16, 32, 64)
}
# Triton's name of a type -> numpy's.
REGISTERS = {"int1": np.dtype(np.bool_), **INTEGERS, **FLOATS}
MEMORY = REGISTERS | {"bf16": np.dtype(np.uint16)}

# What memory holds that nobody may read: NaN, or a number that is no index.
POISON: dict[str, Any] = {
    "int1": True,
    **{name: np.array(0x5A5A5A5A5A5A5A5A).astype(kind) for name, kind in INTEGERS.items()},
    **dict.fromkeys(FLOATS, np.nan),
    "bf16": np.uint16(0x7FC1),
}

OF_TORCH = {
    torch.bool: gl.int1,
    torch.uint8: gl.uint8,
    torch.int8: gl.int8,
    torch.int16: gl.int16,
    torch.int32: gl.int32,
    torch.int64: gl.int64,
    torch.float16: gl.float16,
    torch.bfloat16: gl.bfloat16,
    torch.float32: gl.float32,
    torch.float64: gl.float64,
}


def scalar(data: Any) -> Any:
    """Of one integer Python's, which is fast and exact; other data as it is."""
    if isinstance(data, int) or np.ndim(data):
        return data
    return data.item() if data.dtype.kind in "biu" else data[()]


def round_to_bfloat16(x: Any) -> Any:
    """fp32 -> fp32 with 8 bits of precision, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    to_even = np.uint32(0x7FFF) + ((bits >> 16) & 1)
    rounded = ((bits + to_even) & np.uint32(0xFFFF0000)).view(np.float32).reshape(np.shape(x))
    return np.where(np.isnan(x), np.float32("nan"), rounded)[()]


def cast(data: Any, source: Any, target: Any) -> Any:
    """In registers."""
    if source == target:
        return data
    if source.name not in REGISTERS or target.name not in REGISTERS:
        raise fault(f"cannot cast {source} to {target}")
    if target.name == "int1":
        return scalar(np.not_equal(data, 0))
    converted = np.asarray(data).astype(REGISTERS[target.name])
    return round_to_bfloat16(converted) if target.name == "bf16" else scalar(converted)


def to_registers(raw: Any, dtype: Any) -> Any:
    if dtype.name != "bf16":
        return scalar(raw)
    return (np.asarray(raw).astype(np.uint32) << 16).view(np.float32)[()]


def to_memory(data: Any, dtype: Any) -> Any:
    if dtype.name != "bf16":
        return data
    return (round_to_bfloat16(data).view(np.uint32) >> 16).astype(np.uint16)
