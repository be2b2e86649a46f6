"""Runs Gluon kernels for Hopper on a CPU, with numpy, and looks for what a GPU shows only rarely.

`install` lets `kernel[grid](...)` of `@gluon.jit` functions take CPU tensors. A program (CTA) runs
after another; the partitions of `gl.warp_specialize` are threads of which one runs at a time.

What is checked, by file:

- `races`: every access to shared memory is ordered after those that it conflicts with, through
  barriers, waits and program order (vector clocks, as in happens-before race detectors), whatever
  the order in which the partitions happened to run. A reader by TMA or wgmma of what threads or
  cp.async wrote needs a fence_async_shared in between (PTX ISA, "Proxies" and "Asynchronous warp-
  group level matrix instructions").
- `copies`, `products`: data of a copy is NaN until the copy lands, which is as late as its barrier
  or group allows; operands in shared memory are read when `warpgroup_mma_wait` says so at the
  latest. `timing` chooses other moments and orders of partitions, by a seed.
- `barriers`: phases, arrival counts, bytes. If every partition waits: `DeadlockError`, which says
  for what.
- `global_memory`: no access outside of the tensors that were passed; masked lanes without
  ``other`` are NaN.
- `values`: int32 does not overflow; bf16 rounds to nearest even, and only casts, products,
  comparisons and copies take it.

What it cannot tell: layouts, registers, shared memory used and alignment (compile the kernel
ahead of time for that); races among the warps of one partition, where the compiler sets barriers;
races in global memory, among programs or partitions; cluster, multicast, Blackwell.
"""

from gluon_interpreter.launch import install
from gluon_interpreter.partitions import DeadlockError
from gluon_interpreter.source import KernelError
from gluon_interpreter.timing import timing

__all__ = ["DeadlockError", "KernelError", "install", "timing"]
