"""A plan as tables for people, as JSON, and as settings to train with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distmoe.config import Config, resolve
from distmoe.config.batch import micro_batches
from distmoe.config.keys import value_of, with_values
from distmoe.planner.hardware import Hardware
from distmoe.planner.job_memory import zero3_host_memory
from distmoe.planner.layouts import FREE, differing
from distmoe.planner.plan_job import Layout, Plan
from distmoe.planner.remedies import OFFLOAD, Remedy

GIB = 2**30
DISPATCH = ("moe.dispatch.level", "moe.dispatch.order", "moe.dispatch.steps")
LEAST_SHARE = 0.01
"""Parts of a step below it are not printed."""
COLUMNS = (
    "#",
    "tokens/s/GPU",
    "MFU",
    "step s",
    "waits",
    "GiB",
    "engine",
    "ep",
    "shards",
    "batch",
    "recompute",
    "exchange",
)
LEFT = ("engine", "recompute", "exchange")
LETTERS = "abcdefghij"


def print_plan(plan: Plan, hardware: Hardware, console: Console) -> None:
    """Layouts that fit, the config's own among them, and the fastest that do not."""
    rows = [(str(number), layout) for number, layout in enumerate(plan.best, 1)]
    too_large = f"more than the {hardware.memory_bytes / GIB:.1f} GiB of a GPU"
    if plan.as_written is not None:
        fits = plan.as_written.memory.total <= hardware.memory_bytes
        rows.append(("file" if fits else "file*", plan.as_written))
    if rows:
        title = "Fastest layouts, and that of the file" if plan.best else "The layout of the file"
        console.print(_table(rows, title))
        if rows[-1][0] == "file*":
            console.print(f"   * does not fit: it needs {too_large}")
    for problem in plan.impossible:
        console.print(f"as it is, the file is impossible here: {problem}")
    if plan.misfits:
        need = "Faster, but they need" if plan.best else "The fastest, which need"
        rows = list(zip(LETTERS, (misfit.layout for misfit in plan.misfits), strict=False))
        console.print(_table(rows, f"\n{need} {too_large}"))
        for letter, misfit in zip(LETTERS, plan.misfits, strict=False):
            if misfit.changed is not None:
                console.print(
                    f"   {letter} fits with {_said(misfit.changes)}: then "
                    f"{misfit.changed.time.tokens_per_s_per_rank:,.0f} tokens/s/GPU"
                )
    if plan.best:
        _print_best(plan.best[0], console)


def print_remedies(
    found: Sequence[Remedy], config: Config, hardware: Hardware, console: Console
) -> None:
    """``found`` for ``config``, as it was read."""
    console.print("No layout fits. What the smallest ones need of each GPU:")
    for remedy in found:
        verdict = "fits" if remedy.fits else "does not fit"
        console.print(
            f"  {remedy.bytes / GIB:7.1f} GiB, {verdict}: {remedy.world} GPUs, "
            f"{_said(remedy.values)}{_host_memory(remedy, config, hardware)}"
        )


def _host_memory(remedy: Remedy, config: Config, hardware: Hardware) -> str:
    """What a remedy by offload needs beside the GPUs' memory."""
    if not remedy.values.keys() >= OFFLOAD.keys():
        return ""
    resolved = resolve(with_values(config, remedy.values), remedy.world)
    size = hardware.ranks_per_node * zero3_host_memory(resolved, remedy.world)
    return f", and about {size / GIB:,.0f} GiB of host memory a node"


def _table(rows: Sequence[tuple[str, Layout]], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in LEFT else "right", no_wrap=True)
    for number, layout in rows:
        table.add_row(number, *_cells(layout))
    return table


def _cells(layout: Layout) -> list[str]:
    config, time = layout.config, layout.time
    parallel, train, dispatch = config.parallel, config.train, config.moe.dispatch
    travels = f"{dispatch.level}, {dispatch.order}, {dispatch.steps}"
    return [
        f"{time.tokens_per_s_per_rank:,.0f}",
        "-" if time.mfu is None else f"{time.mfu:.1%}",
        f"{time.seconds:.3g}",
        f"{time.waiting_share:.0%}",
        f"{layout.memory.total / GIB:.1f}",
        engine_name(config),
        str(parallel.ep),
        f"{parallel.dp_shard} x {parallel.dp_replicate}",
        f"{train.micro_batch_size} x {micro_batches(config, time.ranks)}",
        train.activation_checkpoint,
        travels if parallel.ep > 1 else "",
    ]


def engine_name(config: Config) -> str:
    """The engine with what it frees or shards."""
    parallel = config.parallel
    if parallel.engine == "deepspeed":
        return f"deepspeed zero {config.deepspeed.zero_stage}"
    if parallel.engine == "fsdp2" and parallel.dp_shard > 1:
        return "fsdp2" if parallel.reshard_after_forward else "fsdp2, no reshard"
    return parallel.engine


def _print_best(best: Layout, console: Console) -> None:
    time, memory = best.time, best.memory
    console.print(f"\nBest: {time.tokens_per_day / 1e9:,.3g} B tokens/day")
    shares = sorted(time.parts_s.items(), key=lambda part: -part[1])
    console.print(
        "  time    "
        + ", ".join(
            f"{name} {seconds / time.seconds:.0%}"
            for name, seconds in shares
            if seconds > LEAST_SHARE * time.seconds
        )
    )
    sizes = {name: size for name, size in asdict(memory).items() if isinstance(size, int)}
    text = ", ".join(f"{name} {size / GIB:.1f}" for name, size in sizes.items())
    console.print(f"  memory  {text} GiB ({memory.moment})")


def _said(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {_toml(value)}" for key, value in values.items())


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def options_of(layout: Layout, config: Config) -> list[str]:
    """Options that turn ``config``, as it was read, into the layout."""
    changes = differing(config, layout.config, (*FREE, *DISPATCH))
    return [word for key, value in changes.items() for word in (f"--{key}", _toml(value))]


def as_toml(changes: Mapping[str, Any], *, file: Path, written_to: Path) -> str:
    """A file that extends ``file`` by the values of dotted keys."""
    import tomli_w

    tables: dict[str, Any] = {"extends": os.path.relpath(file, written_to.parent)}
    for key, value in changes.items():
        *path, name = key.split(".")
        table = tables
        for section in path:
            table = table.setdefault(section, {})
        table[name] = value
    return tomli_w.dumps(tables)


def as_json(plan: Plan, hardware: Hardware, *, world: int, skew: float) -> dict[str, Any]:
    """Every figure of the layouts in the tables."""

    def figures(layout: Layout) -> dict[str, Any]:
        time = layout.time
        return {
            "settings": {key: value_of(layout.config, key) for key in (*FREE, *DISPATCH)},
            "memory_bytes": asdict(layout.memory) | {"total": layout.memory.total},
            "step_seconds": time.seconds,
            "parts_seconds": dict(time.parts_s),
            "tokens_per_second_per_rank": time.tokens_per_s_per_rank,
            "tokens_per_day": time.tokens_per_day,
            "tflops_per_rank": time.flops_per_rank / 1e12,
            "mfu": time.mfu,
        }

    return {
        "ranks": world,
        "hardware": hardware.name,
        "ranks_per_node": hardware.ranks_per_node,
        "device_memory_bytes": hardware.memory_bytes,
        "skew": skew,
        "layouts": plan.tried,
        "fitting": plan.fitting,
        "best": [figures(layout) for layout in plan.best],
        "misfits": [
            figures(misfit.layout)
            | {
                "changes_to_fit": misfit.changes,
                "changed": figures(misfit.changed) if misfit.changed else None,
            }
            for misfit in plan.misfits
        ],
        "as_written": figures(plan.as_written) if plan.as_written else None,
        "impossible": plan.impossible,
    }
