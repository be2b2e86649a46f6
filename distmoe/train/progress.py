"""How far a run has come, beside what the model, the optimizer and the schedule know."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distmoe.checkpoint.manifest import read_manifest
from distmoe.config.sample_ranges import as_written, sample_ranges
from distmoe.data.sampler import FROM_THE_START, DataPosition


@dataclass(frozen=True)
class Progress:
    """Where the data go on, and with it the steps that are ``done``; ``lr``: of the last one, if
    known."""

    data: DataPosition
    lr: float | None = None

    @property
    def done(self) -> int:
        """Finished steps."""
        return self.data.step

    def about(self) -> dict[str, Any]:
        """What a checkpoint's manifest keeps of it, beside the step."""
        left_out = as_written(self.data.left_out)
        return {"samples": self.data.samples, "left_out": left_out, "lr": self.lr}


NOTHING_DONE = Progress(FROM_THE_START)


def saved_progress(checkpoint: Path, done: int) -> Progress:
    """Of a checkpoint. One that an older version wrote has its batch size, which then was that of
    all steps before, or does not have what was left out."""
    about = read_manifest(checkpoint).about
    if "samples" in about:
        left_out = sample_ranges(about.get("left_out", ()))
        return Progress(DataPosition(done, int(about["samples"]), left_out), about["lr"])
    saved = tomllib.loads(about.get("config", ""))
    batch = int(saved.get("train", {}).get("global_batch_size", 0))
    return Progress(DataPosition(done, done * batch))
