"""metrics.jsonl and TensorBoard, on rank 0."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from distmoe.metrics.expert_load import IntArray, heat_map
from distmoe.metrics.record import GROUPS, StepRecord


class JsonlWriter:
    """One object a step. On resume the lines of steps that were lost are cut first, so that the
    file has each step once."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                if _step_of(line) <= resumed_step:
                    kept.append(line + "\n")
        path.write_text("".join(kept))
        self._file = path.open("a")

    def write(self, values: dict[str, Any]) -> None:
        # JSON has no NaN; a missing number is null.
        safe = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        self._file.write(json.dumps(safe) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    """The step of a line; infinity for one that a kill cut off."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


class TensorBoardWriter:
    """Scalars in named groups; the load of every expert as histograms and as an image."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(path), purge_step=resumed_step + 1)

    def write(self, record: StepRecord) -> None:
        flat = record.flat()
        for group, names in GROUPS.items():
            for name in names:
                self._scalar(f"{group}/{name}", flat[name], record.step)

    def _scalar(self, tag: str, value: float, step: int) -> None:
        self._writer.add_scalar(tag, value, step)

    def validation(self, step: int, loss: float) -> None:
        self._scalar("validation/loss", loss, step)

    def expert_load(self, step: int, freq_LE: IntArray) -> None:
        for layer, freq_E in enumerate(freq_LE):
            share = freq_E / max(float(freq_E.mean()), 1e-9)
            self._writer.add_histogram(f"experts/load_layer_{layer}", share, step)
        self._writer.add_image(
            "experts/load_layer_by_expert", heat_map(freq_LE), step, dataformats="HWC"
        )

    def close(self) -> None:
        self._writer.close()
