"""Runs Gluon kernels for Hopper on a CPU, with numpy, and looks for what a GPU shows only rarely.

`install` lets `kernel[grid](...)` of `@gluon.jit` functions take CPU tensors. A program (CTA) runs
after another; the partitions of `gl.warp_specialize` are threads of which one runs at a time.

What is checked, by file:

- `races`: every access to shared memory is ordered after those that it conflicts with, through
  barriers, waits and program order (vector clocks, as in happens-before race detectors), whatever
  the order in which the partitions happened to run. What threads or cp.async wrote needs a
  fence_async_shared before TMA or wgmma use it (PTX ISA, "Proxies" and "wgmma.mma_async").
- `barriers`: phases, arrival counts, bytes. If every partition waits: `DeadlockError`, which says
  for what.
- `copies`, `cp_async`, `tma`, `products`: data lands, and shared memory is read, as late as
  barriers and waits allow; until then the place of a copy holds NaN. None outlives its partition.
  `timing` has other moments and orders of partitions, drawn from a seed.
- `shared_memory`: shapes, types, indices; reinterpreted buffers whose elements would change places.
- `global_memory`: no access outside of the tensors that were passed; masked elements without
  ``other`` are NaN.
- `values`: integers do not overflow; bf16 rounds to nearest even, and takes no arithmetic.

What it cannot tell: whether layouts fit, registers, the amount of shared memory, alignment (compile
the kernel ahead of time for that); races among the warps of one partition, where the compiler puts
barriers, and in global memory; a load that overwrites what threads read through the other proxy,
for which CUTLASS uses no fence either; clusters, multicast, Blackwell.
"""

from gluon_interpreter.launch import install
from gluon_interpreter.partitions import DeadlockError
from gluon_interpreter.source import KernelError
from gluon_interpreter.timing import timing

__all__ = ["DeadlockError", "KernelError", "install", "timing"]
