"""The tensors that a kernel got, as flat memory, and reads and writes through pointers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.experimental.gluon.language as gl

from gluon_interpreter.dtypes import OF_TORCH, POISON, cast, to_memory, to_registers
from gluon_interpreter.source import fault
from gluon_interpreter.values import Value, as_value, same_rank, unwrap


class Memory:
    """The elements of a tensor, from its first to its last one, whatever its strides."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        flat = tensor.detach().as_strided((extent if tensor.numel() else 0,), (1,))
        self.name, self.dtype = name, OF_TORCH[tensor.dtype]
        raw = flat.view(torch.uint16) if tensor.dtype == torch.bfloat16 else flat
        self.flat = raw.numpy()

    def check(self, low: int, high: int, what: str) -> None:
        """Elements ``low`` to ``high`` are accessed."""
        if low < 0 or high >= len(self.flat):
            wrong = low if low < 0 else high
            raise fault(f"{what} element {wrong} of {self.name}, which has {len(self.flat)}")

    def check_all(self, offsets: Any, what: str) -> None:
        if np.size(offsets):
            self.check(int(np.min(offsets)), int(np.max(offsets)), what)


def pointer_to(memory: Memory) -> Value:
    return Value(0, gl.pointer_type(memory.dtype), None, memory)


def memory_of(pointer: Any, what: str) -> Memory:
    memory = pointer.memory if isinstance(pointer, Value) else None
    if not isinstance(memory, Memory):
        raise fault(f"{what} {getattr(pointer, 'dtype', pointer)}, which is no pointer")
    return memory


def gather(pointer: Value, mask: Any, fill: Any, what: str) -> Any:
    """Raw elements at ``pointer``, ``fill`` where the mask is false."""
    memory = memory_of(pointer, what)
    if mask is None:
        memory.check_all(pointer.data, what)
        return memory.flat[pointer.data]
    mask = as_value(unwrap(mask))
    same_rank(pointer, mask)
    offsets, live = np.broadcast_arrays(pointer.data, mask.data)
    memory.check_all(offsets[live], what)
    raw = np.broadcast_to(np.asarray(fill, memory.flat.dtype), offsets.shape).copy()
    raw[live] = memory.flat[offsets[live]]
    return raw


def load(
    pointer: Value, mask: Any = None, other: Any = None, *, cache_modifier: Any = None,
    eviction_policy: Any = None, volatile: Any = False, cache_policy: Any = None,
) -> Value:  # fmt: skip
    dtype = memory_of(pointer, "load through").dtype
    fill = POISON[dtype.name]
    if other is not None:
        value = as_value(unwrap(other))
        fill = to_memory(cast(value.data, value.dtype, dtype), dtype)
    raw = gather(pointer, mask, fill, "load of")
    return Value(to_registers(raw, dtype), dtype, pointer.layout)


def store(
    pointer: Value, value: Any, mask: Any = None, *, cache_modifier: Any = None,
    eviction_policy: Any = None, cache_policy: Any = None,
) -> None:  # fmt: skip
    memory, value = memory_of(pointer, "store through"), as_value(unwrap(value))
    live = True if mask is None else as_value(unwrap(mask)).data
    same_rank(pointer, value)
    raw = to_memory(cast(value.data, value.dtype, memory.dtype), memory.dtype)
    offsets, raw, live = np.broadcast_arrays(pointer.data, raw, live)
    if offsets.shape != pointer.shape:
        raise fault(f"a tensor of {value.shape} is stored through pointers of {pointer.shape}")
    memory.check_all(offsets[live], "store to")
    memory.flat[offsets[live]] = raw[live]
