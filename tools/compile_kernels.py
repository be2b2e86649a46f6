"""Compile the fused kernels of shapes of the bench into Triton's cache, several at a time.

python tools/compile_kernels.py --shapes 7B,README [--all-tiles] [--jobs N] [--json FILE]

Kernels are compiled when they are first launched, one after the other; a bench of many shapes would
wait for that with the GPU idle. Nothing is launched, and no memory of the GPU taken.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.runtime.jit import JITFunction

from distmoe.arguments import new_file, positive
from distmoe.bench.kernels.shapes import Shape, find_shapes
from distmoe.bench.kernels.tuning import why_untunable
from distmoe.bench.tool import command_line
from distmoe.kernels.moe_mlp import PairIndex, Runs, load_backend
from distmoe.kernels.moe_mlp.find_tiles import triton_version
from distmoe.kernels.moe_mlp.tiles import SPACE


@dataclass(frozen=True)
class Compiled:
    """``tiling``: of `TileSpace.tiling`, or None for the defaults of the device."""

    shape: str
    tiling: int | None
    launches: int
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    work = [(shape, tiling) for shape in options.shapes for tiling in options.tilings]
    begun = time.perf_counter()
    done = compile_all(work, options.jobs)
    seconds = round(time.perf_counter() - begun, 1)
    _print_table(done)
    launches = sum(one.launches for one in done)
    print(f"{launches} launches of {len(done)} shapes and tilings compiled in "
          f"{seconds:.1f} s by {options.jobs} processes")  # fmt: skip
    if options.json:
        facts = {
            "command": command_line(),
            "device": torch.cuda.get_device_name(),
            "triton": triton_version(),
            "jobs": options.jobs,
            "seconds": seconds,
            "compiled": [asdict(one) for one in done],
        }
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    """With the shapes in the place of their names, and the tilings of all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    listed = {"type": lambda text: [word for word in text.split(",") if word], "metavar": "A,B"}
    parser.add_argument("--shapes", **listed, default=["7B"], help="as bench_moe.py has them")
    parser.add_argument("--all-tiles", action="store_true", help="not only the default tiles")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="processes")
    parser.add_argument(
        "--json", type=new_file, metavar="FILE", help="what was compiled, and how long"
    )
    options = parser.parse_args(argv)
    try:
        options.shapes = find_shapes(options.shapes)
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("there is no GPU to compile for")
    options.tilings = [None]
    if options.all_tiles:
        if why := why_untunable(options.shapes, torch.bfloat16, torch.device("cuda")):
            parser.error(f"--all-tiles: {why}")
        options.tilings = range(SPACE.most_candidates)
    return options


def compile_all(work: Sequence[tuple[Shape, int | None]], jobs: int) -> list[Compiled]:
    """`compile_shape` of all ``work``, several at a time."""
    # A child of a fork cannot use CUDA.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_shape, *zip(*work, strict=True)))


def compile_shape(shape: Shape, tiling: int | None) -> Compiled:
    begun = time.perf_counter()
    with nullcontext() if tiling is None else SPACE.tiling(tiling), compile_only() as launches:
        forward_and_backward(shape)
    return Compiled(shape.name, tiling, len(launches), round(time.perf_counter() - begun, 1))


def _print_table(done: Sequence[Compiled]) -> None:
    table = Table("shape", "tiling", "launches", "seconds", box=None)
    for one in done:
        tiling = "default" if one.tiling is None else str(one.tiling)
        table.add_row(one.shape, tiling, str(one.launches), f"{one.seconds:.1f}")
    Console().print(table)


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
