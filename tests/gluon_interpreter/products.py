"""wgmma: products of shared memory that run while the partition goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import triton.experimental.gluon.language as gl

from gluon_interpreter.dtypes import to_registers
from gluon_interpreter.partitions import Partition, current
from gluon_interpreter.races import Access
from gluon_interpreter.shared_memory import View
from gluon_interpreter.source import fault, line
from gluon_interpreter.timing import Landing
from gluon_interpreter.values import Value, unwrap


class Product:
    """``before``: the accumulator that it adds to, or the product that makes it."""

    def __init__(self, a: Any, b: Any, before: Any, reads: list[Access]) -> None:
        self.a, self.b, self.before, self.reads = a, b, before, reads
        self.line = line()
        self.result: Any = None

    def compute(self) -> None:
        if self.result is not None:
            return
        before = self.before
        if isinstance(before, Product):
            before.compute()
            before = before.result
        self.result = factor(self.a) @ factor(self.b) + before

    def finish(self, partition: Partition) -> None:
        self.compute()
        for access in self.reads:
            access.done.append(partition.now)

    def __str__(self) -> str:
        return f"wgmma at {self.line}"


class Accumulator(Value):
    """The result of a product that may still run; `warpgroup_mma_wait` gives the numbers."""

    def __init__(self, product: Product, shape: tuple[int, ...], dtype: Any, layout: Any) -> None:
        self.product, self.of_shape = product, shape
        self.dtype, self.layout, self.memory = dtype, layout, None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of_shape

    @property
    def data(self) -> Any:
        raise fault(f"the result of {self.product} is used without warpgroup_mma_wait")


def factor(x: View) -> Any:
    return np.asarray(to_registers(x.array, x.dtype), np.float32)


def check_operands(a: Any, b: Any, acc: Value, partition: Partition) -> None:
    if not isinstance(a, View) or not isinstance(b, View):
        raise fault(f"wgmma of {type(a).__name__} and {type(b).__name__}, not shared memory")
    if a.dtype != b.dtype or a.dtype.name not in ("fp16", "bf16"):
        raise fault(f"wgmma of {a.dtype} and {b.dtype}: only fp16 and bf16 are emulated")
    if acc.dtype.name != "fp32":
        raise fault(f"wgmma accumulates in {acc.dtype}: only float32 is emulated")
    if len(a.shape) != 2 or (a.shape[1], acc.shape) != (b.shape[0], (a.shape[0], b.shape[1])):
        raise fault(f"wgmma of {a.shape} and {b.shape} to {acc.shape}")
    if partition.num_warps % 4:
        raise fault(f"wgmma by {partition.num_warps} warps, which is no whole warp group")


def warpgroup_mma(a: Any, b: Any, acc: Value, *, is_async: Any) -> Value:
    partition = current()
    if not unwrap(is_async):
        raise fault("wgmma is emulated with is_async=True only")
    check_operands(a, b, acc, partition)
    before = acc.product if isinstance(acc, Accumulator) else acc.data
    reads = [view.access("wgmma", write=False, generic=False, over=False) for view in (a, b)]
    product = Product(a, b, before, reads)
    partition.products.append(product)
    landing, rng = partition.program.timing.landing, partition.program.rng
    if landing is Landing.AT_ONCE or (rng and rng.random() < 0.5):
        product.compute()
    return Accumulator(product, acc.shape, gl.float32, acc.layout)


def warpgroup_mma_wait(num_outstanding: Any = 0, deps: Sequence[Any] | None = None) -> Any:
    """The accumulators in ``deps``, with numbers if their products are over."""
    if deps is None:
        raise fault("warpgroup_mma_wait needs deps, the accumulators that it waits for")
    partition, left = current(), int(unwrap(num_outstanding))
    while len(partition.products) > left:
        partition.products.pop(0).finish(partition)
    results = [finished(dep, partition) for dep in deps]
    return results[0] if len(results) == 1 else tuple(results)


def finished(dep: Any, partition: Partition) -> Any:
    if not isinstance(dep, Accumulator) or dep.product in partition.products:
        return dep
    return Value(dep.product.result, dep.dtype, dep.layout)
