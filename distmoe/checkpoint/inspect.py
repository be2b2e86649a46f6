"""What checkpoints hold, as tables for people and as JSON."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distmoe.checkpoint.manifest import Manifest, read_manifest
from distmoe.checkpoint.tensors import SavedTensor, saved_tensors

MIB = 1 << 20


def inspect(path: Path, console: Console, *, all_tensors: bool, as_json: bool) -> None:
    """Print who wrote checkpoint ``path``, its files and tensors: those of the model, or all.

    OSError or ValueError if it cannot be read; nothing is hashed.
    """
    manifest, tensors = read_manifest(path), saved_tensors(path)
    shown = [tensor for tensor in tensors if all_tensors or tensor.name.startswith("model.")]
    if as_json:
        console.file.write(json.dumps(_report(manifest, shown), indent=1) + "\n")
        return
    console.print(str(path), style="bold", highlight=False, soft_wrap=True)
    console.print(_facts(manifest))
    console.print(_rooms(tensors))
    console.print(_tensors(shown))


def _report(manifest: Manifest, tensors: list[SavedTensor]) -> dict[str, Any]:
    return {
        "step": manifest.step,
        "bytes": manifest.bytes,
        "about": dict(manifest.about),
        "files": {name: asdict(mark) for name, mark in manifest.files.items()},
        "tensors": [
            {**asdict(tensor), "dtype": _dtype(tensor), "bytes": tensor.bytes} for tensor in tensors
        ],
    }


def _facts(manifest: Manifest) -> Table:
    table = Table("key")
    table.add_column("value", overflow="fold")
    table.add_row("step", str(manifest.step))
    table.add_row("files", f"{len(manifest.files)}, {manifest.bytes / MIB:,.1f} MiB")
    for key, value in manifest.about.items():
        if key not in ("config", "hf_config"):
            table.add_row(key, str(value))
    return table


def _rooms(tensors: list[SavedTensor]) -> Table:
    table = Table("room", title="tensors", title_justify="left")
    for name in ("tensors", "values", "MiB"):
        table.add_column(name, justify="right")
    by_room: dict[str, list[SavedTensor]] = defaultdict(list)
    for tensor in tensors:
        by_room[tensor.name.partition(".")[0]].append(tensor)
    for room, members in by_room.items():
        size = sum(tensor.bytes for tensor in members)
        values = size and sum(tensor.bytes // tensor.dtype.itemsize for tensor in members)
        table.add_row(room, f"{len(members)}", f"{values:,}", f"{size / MIB:,.1f}")
    return table


def _tensors(tensors: list[SavedTensor]) -> Table:
    table = Table()
    table.add_column("name", overflow="fold")
    for name in ("shape", "dtype", "MiB", "pieces"):
        table.add_column(name, justify="right")
    for tensor in tensors:
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        size = f"{tensor.bytes / MIB:,.2f}"
        table.add_row(tensor.name, shape, _dtype(tensor), size, str(tensor.pieces))
    return table


def _dtype(tensor: SavedTensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
