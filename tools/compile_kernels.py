"""Compile the fused kernels of shapes of the bench into Triton's cache, several at a time.

python tools/compile_kernels.py --shapes 7B,README [--all-tiles] [--jobs N]

Kernels are compiled when they are first launched, one after the other; a bench of many shapes would
wait for that with the GPU idle. Nothing is launched, and no memory of the GPU taken.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from distmoe.arguments import positive
from distmoe.bench.kernels.shapes import Shape, find_shapes
from distmoe.kernels.moe_mlp import PairIndex, Runs, load_backend
from distmoe.kernels.moe_mlp.tiles import CANDIDATES, override

NUM_TILINGS = max(map(len, CANDIDATES.values()))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    listed = {"type": lambda text: [word for word in text.split(",") if word], "metavar": "A,B"}
    parser.add_argument("--shapes", **listed, default=["7B"], help="as bench_moe.py has them")
    parser.add_argument("--all-tiles", action="store_true", help="not only the default tiles")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(argv)
    try:
        shapes = find_shapes(options.shapes)
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("there is no GPU to compile for")
    work = [
        (s, tiling) for s in shapes for tiling in range(NUM_TILINGS if options.all_tiles else 1)
    ]
    begun = time.perf_counter()
    # A child of a fork cannot use CUDA.
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        launches = sum(pool.map(compile_shape, *zip(*work, strict=True)))
    print(f"{launches} launches of {len(work)} shapes and tilings compiled in "
          f"{time.perf_counter() - begun:.1f} s by {options.jobs} processes")  # fmt: skip
    return 0


def compile_shape(shape: Shape, tiling: int) -> int:
    """Compile forward and backward of ``shape`` with the candidates ``tiling`` of every kernel, the
    last where there are fewer; the number of launches."""
    with ExitStack() as stack:
        for kernel, configs in CANDIDATES.items():
            stack.enter_context(override(kernel, configs[min(tiling, len(configs) - 1)]))
        launches: list[str] = stack.enter_context(compile_only())
        forward_and_backward(shape)
    return len(launches)


@contextmanager
def compile_only() -> Iterator[list[str]]:
    """Launches of Triton compile their kernel and do nothing else; their names as they come."""
    names: list[str] = []
    launch = JITFunction.run

    def compile_it(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        names.append(kernel.__name__)
        return launch(kernel, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_it
    try:
        yield names
    finally:
        JITFunction.run = launch


def forward_and_backward(shape: Shape) -> None:
    """Every launch of the backend `triton` for bf16, with tensors that have no memory."""
    T, H, I, E, L = shape.T, shape.H, shape.I, shape.E, shape.T * shape.K

    def new(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    pairs, offsets = new(L, dtype=torch.int32), new(E + 1, dtype=torch.int32)
    index = PairIndex(pairs, offsets, pairs, new(T + 1, dtype=torch.int32))
    runs, rows = Runs.of_all(index), slice(0, T)
    w_in, w_out, x, y_LH = new(E, 2 * I, H), new(E, H, I), new(T, H), new(L, H)
    z, a, score = new(L, 2 * I), new(L, I), new(L, dtype=torch.float32)
    mlp = load_backend("triton")
    mlp.forward(x, w_in, w_out, index=index, runs=runs, z_LG=z, a_LI=a, y_LH=y_LH)
    mlp.dgrad(
        x, score, z, w_in, w_out,
        index=index, runs=runs, dz_LG=z, a_LI=a, dx_LH=y_LH, dscore_L=score,
    )  # fmt: skip
    for scores in (score, None):
        mlp.row_sum(y_LH, index=index, rows=rows, score_L=scores, out_RH=x)
    mlp.wgrad(x, x, z, a, index=index)


if __name__ == "__main__":
    sys.exit(main())
