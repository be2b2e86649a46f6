"""The tensors that a kernel got, as flat memory, and reads and writes through pointers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.experimental.gluon.language as gl

from gluon_interpreter.source import fault
from gluon_interpreter.values import (
    NUMPY,
    Value,
    as_value,
    cast,
    round_to_bfloat16,
    same_rank,
    unwrap,
)

# Triton's name of a type -> numpy's, in memory, where bf16 is the upper half of fp32.
STORAGE = NUMPY | {"bf16": np.dtype(np.uint16)}

# What memory holds that nobody may read: NaN, or a number that is no index.
POISON: dict[str, Any] = {
    name: np.nan if kind.kind == "f" else np.array(0x5A5A5A5A5A5A5A5A).astype(kind)
    for name, kind in STORAGE.items()
} | {"bf16": np.uint16(0x7FC1)}

TYPES = {
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


def to_registers(raw: Any, dtype: Any) -> Any:
    if dtype.name != "bf16":
        return raw
    return (np.asarray(raw).astype(np.uint32) << 16).view(np.float32)


def to_storage(data: Any, dtype: Any) -> Any:
    if dtype.name != "bf16":
        return data
    return (round_to_bfloat16(data).view(np.uint32) >> 16).astype(np.uint16)


class Memory:
    """The elements of a tensor, from its first to its last one, whatever its strides."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        flat = tensor.detach().as_strided((extent if tensor.numel() else 0,), (1,))
        self.name, self.dtype = name, TYPES[tensor.dtype]
        raw = flat.view(torch.uint16) if tensor.dtype == torch.bfloat16 else flat
        self.flat = raw.numpy()

    def check(self, offsets: Any, what: str) -> None:
        if np.size(offsets) == 0:
            return
        low, high = int(np.min(offsets)), int(np.max(offsets))
        if low < 0 or high >= len(self.flat):
            wrong = low if low < 0 else high
            raise fault(f"{what} element {wrong} of {self.name}, which has {len(self.flat)}")


def pointer_to(memory: Memory) -> Value:
    return Value(0, gl.pointer_type(memory.dtype), None, memory)


def gather(pointer: Value, mask: Any, fill: Any, what: str) -> Any:
    """Raw elements at ``pointer``, ``fill`` where the mask is false."""
    memory = pointer.memory
    if memory is None:
        raise fault(f"{what} through something that is no pointer: {pointer.dtype}")
    if mask is None:
        memory.check(pointer.data, what)
        return memory.flat[pointer.data]
    mask = as_value(unwrap(mask))
    same_rank(pointer, mask)
    offsets, live = np.broadcast_arrays(pointer.data, mask.data)
    memory.check(offsets[live], what)
    raw = np.broadcast_to(np.asarray(fill, memory.flat.dtype), offsets.shape).copy()
    raw[live] = memory.flat[offsets[live]]
    return raw


def load(pointer: Value, mask: Any = None, other: Any = None, **hints: Any) -> Value:
    if pointer.memory is None:
        raise fault(f"load through something that is no pointer: {pointer.dtype}")
    dtype = pointer.memory.dtype
    fill = POISON[dtype.name]
    if other is not None:
        value = as_value(unwrap(other))
        fill = to_storage(cast(value.data, value.dtype, dtype), dtype)
    data = to_registers(gather(pointer, mask, fill, "load of"), dtype)
    if not np.ndim(data):
        data = data.item() if dtype.name not in ("fp16", "bf16", "fp32", "fp64") else data[()]
    return Value(data, dtype, pointer.layout)


def store(pointer: Value, value: Any, mask: Any = None, **hints: Any) -> None:
    memory, value = pointer.memory, as_value(unwrap(value))
    if memory is None:
        raise fault(f"store through something that is no pointer: {pointer.dtype}")
    same_rank(pointer, value)
    raw = to_storage(cast(value.data, value.dtype, memory.dtype), memory.dtype)
    live = True if mask is None else as_value(unwrap(mask)).data
    offsets, raw, live = np.broadcast_arrays(pointer.data, raw, live)
    if offsets.shape != pointer.shape:
        raise fault(f"a tensor of {value.shape} is stored through pointers of {pointer.shape}")
    memory.check(offsets[live], "store to")
    memory.flat[offsets[live]] = raw[live]
