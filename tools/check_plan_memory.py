"""Compare what `distmoe plan` says of memory with what real training steps hold.

    python tools/check_plan_memory.py [SHAPE ...] [--device cuda] [--json FILE]

Every shape of docs/benchmarks/plan-memory.json trains a few steps on ranks of this machine, twice:
once for the resident set, once for the tensor storages, phase by phase. Exit code: 1 if a resident
peak and its prediction differ by more than 10 %. On a GPU, PyTorch's allocator is asked instead of
the process.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from two_hosts import hosts

from distmoe.arguments import new_file
from distmoe.bench.tool import circumstances
from distmoe.config import Config, resolve, to_toml
from distmoe.config.keys import with_values
from distmoe.planner.environment import device_name
from distmoe.planner.job_memory import JobMemory, predict_memory

LIMIT = 0.10
MIB = 1 << 20
RANK = Path(__file__).with_name("plan_memory_rank.py")

# So that freed memory leaves the process at once, as the resident set is what is measured.
VARIABLES = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)}
VARIABLES |= {"OMP_NUM_THREADS": "1"}

# Shapes, by their ranks and settings, and what was last found of them.
PUBLISHED = Path(__file__).parents[1] / "docs/benchmarks/plan-memory.json"


def main(argv: Sequence[str] | None = None) -> int:
    shapes = {row["name"]: row for row in published()["shapes"]}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(shapes)}")
    parser.add_argument(
        "--json", type=new_file, metavar="FILE", help="every figure, added to those in it"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.shapes if name not in shapes]
    if unknown:
        parser.error(f"SHAPE is {unknown[0]!r}; it must be one of {', '.join(shapes)}")
    rows = []
    for name in arguments.shapes or shapes:
        rows.append(check(shapes[name], arguments.device))
        print_row(rows[-1])
    if arguments.json:
        save(rows, arguments.json)
    return 1 if any(abs(row["error"]) > LIMIT for row in rows) else 0


def published() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(PUBLISHED.read_text())
    return found


def save(rows: list[dict[str, Any]], file: Path) -> None:
    """Into ``file``, in place of what it has of the same shapes."""
    old = json.loads(file.read_text())["shapes"] if file.exists() else []
    by_name = {row["name"]: row for row in (*old, *rows)}
    facts = {"common": published()["common"], "shapes": list(by_name.values())}
    file.write_text(json.dumps(facts, indent=1) + "\n")


def check(shape: dict[str, Any], device: str) -> dict[str, Any]:
    """Measured and predicted bytes of one shape."""
    config, predicted = predict(shape, device)
    process = run_ranks(config, shape["ranks"], storages=False)
    storages = run_ranks(config, shape["ranks"], storages=True)
    return {
        "name": shape["name"],
        **circumstances(),
        "device": device_name(torch.device(device)),
        "ranks": shape["ranks"],
        "settings": shape["settings"],
        "predicted": {**asdict(predicted), "tensors": predicted.tensors},
        "resident": process,
        "storages": storages,
        "error": predicted.tensors / process["peak"] - 1,
        "error_of_storages": predicted.tensors / storages["peak"] - 1,
    }


def predict(shape: dict[str, Any], device: str) -> tuple[Config, JobMemory]:
    """The config of one shape, and what it should hold."""
    world = shape["ranks"]
    values = {**published()["common"], **shape["settings"], "run.device": device}
    config = resolve(with_values(Config(), values), world, local_world=world)
    return config, predict_memory(config, world)


def run_ranks(config: Config, world: int, *, storages: bool) -> dict[str, Any]:
    """What rank 0 measured."""
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder, "config.toml"), Path(folder, "out.json")
        file.write_text(to_toml(config))
        command = [sys.executable, str(RANK), str(file), str(out)]
        command += ["--storages"] if storages else []
        with hosts(0) as here:
            if not here.run_ranks([command] * world, variables=VARIABLES):
                raise RuntimeError("a rank ended badly")
        found: dict[str, Any] = json.loads(out.read_text())
    return found


def print_row(row: dict[str, Any]) -> None:
    """MiB of one shape, a line a part."""
    predicted, resident, storages = row["predicted"], row["resident"], row["storages"]
    parts = ("parameters", "gradients", "optimizer", "activations", "buffers")
    told = ", ".join(f"{part} {predicted[part] / MIB:,.0f}" for part in parts)
    phases = ", ".join(f"{name} {size / MIB:,.0f}" for name, size in storages["phases"].items())
    total = predicted["tensors"] / MIB
    print(f"{row['name']}: predicted {total:,.0f} MiB at {predicted['moment']}")
    print(f"  {told}")
    print(f"  resident {resident['peak'] / MIB:,.0f}, error {row['error']:+.1%}")
    print(f"  storages {storages['peak'] / MIB:,.0f} ({phases}), {row['error_of_storages']:+.1%}")


if __name__ == "__main__":
    sys.exit(main())
