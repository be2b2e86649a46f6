"""bf16 and e4m3 in Triton's interpreter, which keeps them as integers.

Casts of bf16 would truncate and tl.dot would multiply integers. The patch makes fp32 -> bf16 round
to nearest even, bf16 -> fp32 exact, and lets tl.dot see floats. Kernels compute element by element
in fp32 only, so no other operation meets a bf16 value. Casts to e4m3 would round without a carry
into the exponent; the patch has torch do them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter


def patch_casts() -> None:
    """Once per process, before the first interpreted launch."""
    convert = interpreter._convert_float
    dot = interpreter.InterpreterBuilder.create_dot

    def convert_float(x: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            bits = np.ascontiguousarray(x).view(np.uint32)
            to_even = np.uint32(0x7FFF) + ((bits >> 16) & 1)
            rounded = ((bits + to_even) >> 16).astype(np.uint16)
            return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).reshape(x.shape)
        if source == tl.bfloat16 and target == tl.float32:
            bits = np.ascontiguousarray(x).view(np.uint16).astype(np.uint32)
            return (bits << 16).reshape(x.shape)
        if source == tl.float32 and target == tl.float8e4nv:
            values = torch.from_numpy(np.ascontiguousarray(x).view(np.float32).copy())
            return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(x.shape)
        if source == tl.float8e4nv and target == tl.float32:
            codes = torch.from_numpy(np.ascontiguousarray(x).view(np.uint8).copy())
            values = codes.view(torch.float8_e4m3fn).float().numpy()
            return values.view(np.uint32).reshape(x.shape)
        return convert(x, source, target, rounding)

    def as_float(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        values = convert_float(operand.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(values, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        return dot(self, as_float(a), as_float(b), d, precision, imprecise)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
