"""What `distmoe plan` predicts for jobs whose throughput others have published, and by how much it
is off.

python tools/check_plan_published.py
python tools/check_plan_published.py --json docs/benchmarks/plan-published.json

One model predicts all rows of FILE, by default that of docs/benchmarks. What is known of a job is
given: shape, ranks, and of micro-batch, recomputation, axes and exchange what was published, and
the published rate of other kernels than ours. The rest is what the plan finds fastest, as its
owners will have tuned it, too. --json writes the rows with their predictions. Ends with 2 on a
wrong argument, 1 if a row is off by more than --most and does not say why, else 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from distmoe.arguments import new_file
from distmoe.bench.tool import console_of
from distmoe.config import Config
from distmoe.config.keys import value_of, with_values
from distmoe.planner.hardware import find_hardware
from distmoe.planner.layouts import FREE
from distmoe.planner.plan_job import Planner

ROWS = Path(__file__).parents[1] / "docs/benchmarks/plan-published.json"
SKEW = 1.5
"""Of the rows whose routing was not forced."""


@dataclass(frozen=True)
class Row:
    """``published``: tokens/s of a GPU. ``settings``: what is known. ``batch``: sequences of a step
    on a GPU, assumed where the settings do not say. ``machine`` as --hardware. ``expert_flops``: of
    kernels that are not ours, 0 for ours. ``known``, in words, with what is assumed; ``why``: what
    explains a large error."""

    name: str
    source: str
    gpus: int
    published: float
    settings: dict[str, Any]
    known: str
    why: str
    machine: str
    expert_flops: float
    batch: int


@dataclass(frozen=True)
class Found:
    """``error``: of the prediction, over what was published."""

    row: Row
    predicted: float
    layout: dict[str, Any]
    memory_gib: float
    error: float


def predict(row: Row) -> Found:
    """The row by `distmoe plan`'s model."""
    hardware = find_hardware(row.machine)
    if row.expert_flops:
        rates = {"bf16": row.expert_flops}
        dense = {"bf16": hardware.dense_flops("bf16")}
        profile = replace(hardware.profile, gemm_flops=rates, dense_flops=dense)
        hardware = replace(hardware, profile=profile)
    settings = {
        "train.dtype": "bf16",
        "run.device": "cuda",
        **row.settings,
        "train.global_batch_size": row.batch * row.gpus,
    }
    planner = Planner(with_values(Config(), settings), row.gpus, hardware, skew=SKEW)
    layout = planner.plan(pinned=row.settings, top=1, misfits=0).best[0]
    rate = layout.time.tokens_per_s_per_rank
    chosen = {key: value_of(layout.config, key) for key in FREE}
    return Found(row, rate, chosen, layout.memory.total / 2**30, rate / row.published - 1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("file", type=Path, nargs="?", default=ROWS, metavar="FILE")
    parser.add_argument("--json", type=new_file, help="file")
    parser.add_argument("--most", type=float, default=0.25, help="error without a reason (0.25)")
    arguments = parser.parse_args(argv)
    if not arguments.file.is_file():
        parser.error(f"FILE is {arguments.file}; it must be one that --json has written")
    found = [predict(Row(**one["row"])) for one in json.loads(arguments.file.read_text())]
    _show(found)
    if arguments.json:
        rows = [asdict(one) for one in found]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(abs(one.error) > arguments.most and not one.row.why for one in found))


def _show(found: Sequence[Found]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("job", "GPUs", "published", "predicted", "error", "GiB", "known and assumed"):
        table.add_column(name, justify="left" if name in ("job", "known and assumed") else "right")
    for one in found:
        row = one.row
        table.add_row(
            f"{row.name}\n{row.source}",
            f"{row.gpus} {row.machine}",
            f"{row.published:,.0f}",
            f"{one.predicted:,.0f}",
            f"{one.error:+.0%}",
            f"{one.memory_gib:.0f}",
            row.known + (f"\n{row.why}" if row.why else ""),
        )
    console_of(150).print(table)


if __name__ == "__main__":
    sys.exit(main())
