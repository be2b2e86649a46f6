"""Time one MoE layer's expert computation: every backend and peer side by side.

python tools/bench_moe.py --shapes 7B --json bench.json --picture bench.png
See docs/benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from distmoe.planner.kernel_bench import catalog
from distmoe.planner.kernel_bench.environment import environment
from distmoe.planner.kernel_bench.picture import draw
from distmoe.planner.kernel_bench.record import record_of
from distmoe.planner.kernel_bench.report import print_record, print_rounding
from distmoe.planner.kernel_bench.session import Request, run
from distmoe.planner.kernel_bench.shapes import SHAPES, find_shapes
from distmoe.planner.kernel_bench.subjects import MODES
from distmoe.registry import ROUNDING_RULES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


NARROWEST = 110


def main() -> int:
    """2 for a wrong argument, 1 if a backend computed wrong results or broke off, else 0."""
    parser = _parser()
    options = parser.parse_args()
    try:
        request = _request(options)
    except ValueError as error:
        parser.error(str(error))
    # Tables are cut to the width of a terminal, and a file has none.
    console = Console(highlight=False, markup=False, width=max(NARROWEST, Console().width))
    where = environment(request.device)
    console.print(f"{where['device']}, {_versions(where)}")
    records: list[dict[str, Any]] = []
    failed = False
    for result in run(request, lambda line: print(line, file=sys.stderr, flush=True)):
        records.append(record_of(result, str(where["device"])))
        print_record(records[-1], console)
        failed |= any(outcome.failed for outcome in result.outcomes)
        # After every shape, so that a run that is cut off leaves what it has.
        _write(options, where, records)
    print_rounding(records, console)
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time one MoE layer's expert computation on one device.",
        epilog=f"shapes: 1.4B, 7B, 30B, 120B (three each), {', '.join(SHAPES)}. "
        f"backends: {', '.join(catalog.names())}. rounding: {', '.join(ROUNDING_RULES)}.",
    )
    listed = {"type": lambda text: [word for word in text.split(",") if word], "metavar": "A,B"}
    parser.add_argument("--shapes", **listed, help="default: 7B on a GPU, tiny on a CPU")
    parser.add_argument("--backends", **listed, help="default: all that can run on the device")
    parser.add_argument("--mode", **listed, default=list(MODES), help=f"of {', '.join(MODES)}")
    parser.add_argument("--rounding", **listed, default=["none"], help="none is plain top-k")
    parser.add_argument("--rounds", type=int, default=20, help="samples of each figure")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw bars of TFLOP/s")
    parser.add_argument(
        "--tune", action="store_true", help="time the tile configurations of triton"
    )
    parser.add_argument("--profile", action="store_true", help="list the kernels of one iteration")
    parser.add_argument(
        "--time-wrong", action="store_true", help="time what fails the check too, and mark it"
    )
    return parser


def _request(options: argparse.Namespace) -> Request:
    """ValueError for what argparse does not see."""
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise ValueError("--device cuda: there is no CUDA device")
    device = torch.device(options.device or ("cuda" if has_gpu else "cpu"))
    if options.rounds < 1:
        raise ValueError(f"--rounds is {options.rounds}; it must be at least 1")
    for path in (options.json, options.picture):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.absolute().parent}")
    if options.picture is not None and find_spec("matplotlib") is None:
        raise ValueError("--picture needs matplotlib: pip install matplotlib")
    _among("--mode", options.mode, MODES)
    _among("--rounding", options.rounding, list(ROUNDING_RULES))
    backends = options.backends or catalog.default_names(device)
    _among("--backends", backends, catalog.names())
    if options.tune and "triton" not in backends:
        raise ValueError("--tune needs triton among --backends")
    return Request(
        shapes=find_shapes(options.shapes or ["tiny" if device.type == "cpu" else "7B"]),
        rules=options.rounding,
        backends=backends,
        modes=[mode for mode in MODES if mode in options.mode],
        rounds=options.rounds,
        device=device,
        dtype=DTYPES[options.dtype],
        tune=options.tune,
        profile=options.profile,
        time_wrong=options.time_wrong,
    )


def _among(option: str, words: list[str], known: tuple[str, ...] | list[str]) -> None:
    if not words:
        raise ValueError(f"{option} is empty; known: {', '.join(known)}")
    for word in words:
        if word not in known:
            raise ValueError(f"{option}: unknown {word!r}; known: {', '.join(known)}")


def _versions(where: dict[str, Any]) -> str:
    found = {"driver": where["driver"], "CUDA": where["cuda"], **where["versions"]}
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def _write(
    options: argparse.Namespace, where: dict[str, Any], records: list[dict[str, Any]]
) -> None:
    if options.json is not None:
        content = {"command": shlex.join(sys.argv), **where, "results": records}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.picture is not None:
        draw(records, str(where["device"]), options.picture)


if __name__ == "__main__":
    sys.exit(main())
