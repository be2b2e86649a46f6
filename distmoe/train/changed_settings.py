"""Which settings have changed since a checkpoint was saved."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from distmoe.checkpoint.manifest import read_manifest
from distmoe.config import Config
from distmoe.config.keys import key_types, value_of

# What a model is and learns from, and where its schedule ends. The rest may change freely from one
# life of a run to the next.
LEARNING = (
    *("model.", "moe.", "data.", "optim.", "run.seed"),
    *("train.steps", "train.global", "train.dtype"),
)
# Of how it is computed. In what form rows travel is not among them: like train.dtype it rounds.
COMPUTING = (
    "moe.kernel",
    *(f"moe.dispatch.{name}" for name in ("overlap", "level", "order", "steps", "exchange")),
)


def changed_settings(checkpoint: Path, config: Config) -> list[str]:
    """`key VALUE, was VALUE` for each that decides what is learned; keys that the checkpoint's
    version did not have are left out."""
    saved = tomllib.loads(read_manifest(checkpoint).about.get("config", ""))
    changed = []
    for key in key_types():
        if not key.startswith(LEARNING) or key.startswith(COMPUTING):
            continue
        was, now = _value(saved, key), value_of(config, key)
        # TOML knows no tuples.
        now = list(now) if isinstance(now, tuple) else now
        if key == "train.dtype" and was == "auto":
            # An earlier version did not note what that was.
            continue
        if was is not None and was != now:
            changed.append(f"{key} {now!r}, was {was!r}")
    return changed


def saved_optimizer(checkpoint: Path) -> str:
    """optim.name of the run that saved it."""
    saved = tomllib.loads(read_manifest(checkpoint).about.get("config", ""))
    # Older versions had no other.
    return _value(saved, "optim.name") or "adamw"


def _value(tables: dict[str, Any], key: str) -> Any:
    """The value of a dotted key, or None."""
    found: Any = tables
    for name in key.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found
