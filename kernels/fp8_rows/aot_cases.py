"""The kernels that pack and unpack rows, to compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distmoe.kernels.aot import AotCase
from distmoe.kernels.fp8_rows.triton_backend import NUM_WARPS, sizes
from distmoe.kernels.fp8_rows.triton_fp8_rows import (
    dequantize_rows_kernel,
    quantize_rows_kernel,
)

# Elsewhere Triton has no e4m3, and torch packs.
TARGETS = ("sm_90", "sm_100")
BYTES, TOKEN = "*u8:16", "*i64:16"


def cases() -> Iterator[AotCase]:
    """For rows that no vector and no group of values divides, and that both do."""
    for hidden in (1000, 2048):
        for dtype in ("bf16", "fp32"):
            rows, name = f"*{dtype}:16", f"H{hidden} {dtype}"
            signature = {"x_ptr": rows, "packed_ptr": BYTES, "total": "i32"}
            yield _case(f"fp8_rows quantize {name}", quantize_rows_kernel, signature, sizes(hidden))
            signature = {"packed_ptr": BYTES, "token_ptr": TOKEN, "out_ptr": rows, "total": "i32"}
            for gathered in (False, True):
                yield _case(
                    f"fp8_rows dequantize {name}{' gathered' if gathered else ''}",
                    dequantize_rows_kernel,
                    signature if gathered else signature | {"token_ptr": BYTES},
                    {**sizes(hidden), "GATHERED": gathered},
                )


def _case(name: str, kernel: Any, signature: dict[str, str], config: dict[str, int]) -> AotCase:
    return AotCase(
        name, kernel, signature, config, NUM_WARPS, num_stages=3, gemm=False, targets=TARGETS
    )
