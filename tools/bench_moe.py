"""Time one MoE layer's expert computation: every backend and peer side by side.

python tools/bench_moe.py --shapes 7B --json bench.json --picture bench.png
python tools/bench_moe.py --config configs/eight_gpu.toml --tune --write-tiles tiles.toml
See docs/benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from distmoe.arguments import names_of, new_file, positive
from distmoe.bench.kernels import catalog
from distmoe.bench.kernels.config_shapes import shapes_of_run
from distmoe.bench.kernels.picture import draw
from distmoe.bench.kernels.record import record_of
from distmoe.bench.kernels.report import print_record, print_rounding
from distmoe.bench.kernels.session import Request, Result, Session
from distmoe.bench.kernels.shapes import SHAPES, Shape, find_shapes
from distmoe.bench.kernels.subjects import MODES
from distmoe.bench.kernels.tuning import (
    tiles_of_device,
    tuned_layers,
    why_untunable,
    write_tiles,
)
from distmoe.bench.tool import command_line
from distmoe.config import check, load_config, resolve
from distmoe.kernels.moe_mlp.find_tiles import device_name, find_tiles, triton_version
from distmoe.kernels.moe_mlp.tile_table import Origin
from distmoe.planner.environment import environment
from distmoe.registry import MOE_MLP_TILES, ROUNDING_RULES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
NARROWEST = 110


def main(argv: Sequence[str] | None = None) -> int:
    """2 for a wrong argument, 1 if a backend computed wrong results or broke off, else 0."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        request = _request(options)
    except ValueError as error:
        parser.error(str(error))
    # Tables are cut to the width of a terminal, and a file has none.
    console = Console(highlight=False, markup=False, width=max(NARROWEST, Console().width))
    where: dict[str, Any] = environment(request.device)
    console.print(f"{where['device']}, {_versions(where)}")
    where["tiles"] = {
        name: find_tiles(request.tiles, name, request.device).describe(triton_version())
        for name in _tiled(request.backends)
    }
    for name, tiles in where["tiles"].items():
        console.print(f"tiles of {name}: {tiles}")
    records: list[dict[str, Any]] = []
    failed = False
    session = Session(request, lambda line: print(line, file=sys.stderr, flush=True))
    for result in session.results():
        records.append(record_of(result, str(where["device"])))
        print_record(records[-1], console)
        failed |= any(outcome.failed for outcome in result.outcomes)
        # After every shape, so that a run that is cut off leaves what it has.
        _write(options, where, records)
        if options.write_tiles is not None:
            failed |= not _write_tiles(options.write_tiles, where, request, result, console)
    print_rounding(records, console)
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time one MoE layer's expert computation on one device.",
        epilog=f"shapes: 1.4B, 7B, 30B, 120B (three each), {', '.join(SHAPES)}. "
        f"backends: {', '.join(catalog.names())}. rounding: {', '.join(ROUNDING_RULES)}.",
    )
    listed = {"type": lambda text: text.split(","), "metavar": "A,B"}
    parser.add_argument("--shapes", **listed, help="default: 7B on a GPU, tiny on a CPU")
    parser.add_argument(
        "--config", metavar="FILE", help="the layers of a rank of this run, beside --shapes"
    )
    parser.add_argument(
        "--world", type=positive, metavar="N", help="ranks of that run, default launch.nproc"
    )
    backends, modes, rules = map(names_of, (catalog.names(), MODES, ROUNDING_RULES))
    parser.add_argument("--backends", type=backends, help="default: all that can run on the device")
    parser.add_argument("--mode", type=modes, default=list(MODES), help=f"of {', '.join(MODES)}")
    parser.add_argument("--rounding", type=rules, default=["none"], help="none is plain top-k")
    parser.add_argument("--rounds", type=positive, default=20, help="samples of each figure")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write every sample")
    parser.add_argument("--picture", type=new_file, metavar="FILE", help="draw bars of TFLOP/s")
    tiled = ", ".join(MOE_MLP_TILES)
    parser.add_argument(
        "--tiles",
        default="auto",
        metavar="FILE",
        help=f"tile configurations of {tiled}: auto, default or a file, as moe.kernel_tiles",
    )
    parser.add_argument(
        "--tune", action="store_true", help=f"time the tile configurations of {tiled}"
    )
    parser.add_argument(
        "--write-tiles",
        type=new_file,
        metavar="FILE",
        help="with --tune: put the best into it",
    )
    parser.add_argument("--profile", action="store_true", help="list the kernels of one iteration")
    parser.add_argument(
        "--time-wrong", action="store_true", help="time what fails the check too, and mark it"
    )
    return parser


def _request(options: argparse.Namespace) -> Request:
    """ValueError for what argparse does not see; ConfigError is one."""
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise ValueError("--device cuda: there is no CUDA device")
    device = torch.device(options.device or ("cuda" if has_gpu else "cpu"))
    if options.picture is not None and find_spec("matplotlib") is None:
        raise ValueError("--picture needs matplotlib: pip install matplotlib")
    backends = options.backends or catalog.default_names(device)
    if options.tune and not _tiled(backends):
        raise ValueError(f"--tune needs {' or '.join(MOE_MLP_TILES)} among --backends")
    shapes = _shapes(options, device)
    for name in _tiled(backends):
        find_tiles(options.tiles, name, device)
    if options.write_tiles is not None:
        _check_tuning(options, shapes, device)
    return Request(
        shapes=shapes,
        rules=options.rounding,
        backends=backends,
        modes=[mode for mode in MODES if mode in options.mode],
        rounds=options.rounds,
        device=device,
        dtype=DTYPES[options.dtype],
        tiles=options.tiles,
        tune=options.tune,
        profile=options.profile,
        time_wrong=options.time_wrong,
    )


def _tiled(backends: list[str]) -> list[str]:
    return [name for name in backends if name in MOE_MLP_TILES]


def _shapes(options: argparse.Namespace, device: torch.device) -> list[Shape]:
    """Those of --shapes and of --config."""
    if options.world is not None and options.config is None:
        raise ValueError("--world is of --config, which is missing")
    of_run = []
    if options.config is not None:
        config = load_config(options.config)
        world = config.launch.nproc if options.world is None else options.world
        # The data may come later, and be elsewhere.
        check(config, world, with_data=False)
        of_run = shapes_of_run(resolve(config, world))
    names = options.shapes or ([] if of_run else ["tiny" if device.type == "cpu" else "7B"])
    return find_shapes(names) + of_run


def _check_tuning(options: argparse.Namespace, shapes: list[Shape], device: torch.device) -> None:
    if not options.tune:
        raise ValueError("--write-tiles needs --tune")
    if len(options.rounding) > 1:
        raise ValueError("--write-tiles takes one rule of --rounding")
    if why := why_untunable(shapes, DTYPES[options.dtype], device):
        raise ValueError(f"--write-tiles: {why}")
    tiles_of_device(options.write_tiles, device_name(device))


def _write_tiles(
    path: Path, where: dict[str, Any], request: Request, result: Result, console: Console
) -> bool:
    """Put what was measured for one shape into the file; whether there was anything."""
    origin = Origin(
        date=datetime.now(UTC).date().isoformat(),
        driver=where["driver"] or "",
        torch=where["versions"]["torch"],
        triton=triton_version(),
        command=command_line(),
    )
    layers = tuned_layers(result, request.dtype, origin)
    for layer in layers:
        other = [f"{k} {t.config}" for k, t in layer.tiles.items() if t.ms < t.default_ms]
        console.print(f"to {path}: {layer}; other than the default: {', '.join(other) or 'none'}")
    if not layers:
        console.print(f"{result.shape}: no tiles were measured")
        return False
    write_tiles(path, device_name(request.device), layers)
    return True


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
