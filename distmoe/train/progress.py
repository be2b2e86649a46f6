"""How far a run has come, beside what the model, the optimizer and the schedule know."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from distmoe.checkpoint.manifest import read_manifest


@dataclass(frozen=True)
class Progress:
    """``done`` steps, which took, or left out, ``samples`` of the data; ``lr``: of the last one, if
    known."""

    done: int
    samples: int
    lr: float | None = None


NOTHING_DONE = Progress(0, 0)


def saved_progress(checkpoint: Path, done: int) -> Progress:
    """Of a checkpoint. One that an older version wrote has its batch size, which then was that of
    all steps before."""
    about = read_manifest(checkpoint).about
    if "samples" in about:
        return Progress(done, int(about["samples"]), about["lr"])
    saved = tomllib.loads(about.get("config", ""))
    return Progress(done, done * int(saved.get("train", {}).get("global_batch_size", 0)))
