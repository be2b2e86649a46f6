"""Files of a run: JSON lines and TensorBoard events, on rank 0."""

from __future__ import annotations

import json
import math
from io import FileIO
from pathlib import Path
from typing import Any

from distmoe.metrics.cut_lines import cut_after
from distmoe.metrics.expert_load import IntArray
from distmoe.metrics.heat_map import heat_map
from distmoe.metrics.record import GROUPS, StepRecord, ValidationRecord

# Title of a chart in the tab *Custom Scalars* -> its curves.
CHARTS = {
    "loss": ["train/loss", "validation/loss"],
    "speed, tokens/s/rank": ["throughput/tokens_per_second_per_rank"],
    "TFLOP/s/rank: causal attention, and by the PaLM convention": [
        "throughput/tflops_per_rank",
        "throughput/palm_tflops_per_rank",
    ],
    "where a step's time goes, s": [
        "time/data_seconds",
        "time/forward_backward_seconds",
        "time/optimizer_seconds",
        "communication/exposed_seconds",
    ],
    "busiest over mean: expert, tiles of a rank, own time of a rank": [
        "experts/load_max_over_mean",
        "experts/tiles_max_over_mean",
        "throughput/slowest_over_mean",
    ],
    "busiest rank over mean, tiles of each layer": ["layers_tiles_max_over_mean/layer_.*"],
    "tile waste: run, and without rounding": [
        "experts/tile_waste$",
        "experts/tile_waste_unrounded",
    ],
    "pairs that rounding moved": ["experts/pairs_dropped", "experts/pairs_added"],
    "pairs and scores that rounding moved, over those of top-k": [
        "experts/pairs_moved_share",
        "experts/score_moved_share",
    ],
    "scores that rounding moved in each layer": ["layers_score_moved_share/layer_.*"],
    "rows sent, MiB: once per rank, and once per pair": [
        "communication/rows_mib$",
        "communication/rows_mib_with_copies",
    ],
    "sent in all, MiB: inside a node, and between nodes": [
        "communication/node_mib",
        "communication/remote_mib",
    ],
    "share of the step in which a host waits for other ranks": ["communication/exposed_share"],
    "power of a rank's device, W": ["energy/watts_per_rank"],
    "tokens per joule": ["energy/tokens_per_joule"],
}
LAYOUT = {"distmoe": {title: ["Multiline", curves] for title, curves in CHARTS.items()}}


class JsonlWriter:
    """One object a step, at the end of ``file``, whose last one is of ``last_step``."""

    def __init__(self, file: FileIO, last_step: float) -> None:
        self._file, self._last_step, self._waiting = file, last_step, b""

    @classmethod
    def open(cls, path: Path, *, resumed_step: int) -> JsonlWriter:
        """On resume the lines of steps that were lost are cut first, so that the file has each step
        once."""
        last_step = cut_after(path, resumed_step)
        # Without a buffer, which would drop a line that does not fit beside the waiting ones.
        return cls(path.open("ab", buffering=0), last_step)

    def write(self, values: dict[str, Any]) -> None:
        """Append ``values``, which have a ``step``; a step that the file has is left as it is."""
        if values["step"] <= self._last_step:
            return
        self._last_step = values["step"]
        self._waiting += json.dumps(_without_nan(values)).encode() + b"\n"
        self._write_waiting()

    def _write_waiting(self) -> None:
        """What a full disk refuses waits for the next line."""
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def close(self) -> None:
        """Write what still waits, once more."""
        with self._file:
            self._write_waiting()


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity; a missing number is null."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoardWriter:
    """Scalars in named groups; the load of every expert as histograms and as an image. ``writer``:
    an open SummaryWriter."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    @classmethod
    def open(cls, path: Path, *, resumed_step: int) -> TensorBoardWriter:
        """A file of events in the folder ``path``, whose curves go on behind ``resumed_step``."""
        from torch.utils.tensorboard.writer import SummaryWriter

        writer: Any = SummaryWriter(str(path), purge_step=resumed_step + 1)
        writer.add_custom_scalars(LAYOUT)
        return cls(writer)

    def write(self, record: StepRecord | ValidationRecord) -> None:
        """The scalars of a step or of a validation."""
        for tag, value in record.scalars().items():
            self._writer.add_scalar(tag, value, record.step)

    def text(self, name: str, text: str, step: int) -> None:
        """A line in the tab *Text*."""
        self._writer.add_text(name, text, step)

    def experts(self, record: StepRecord, freq_LE: IntArray) -> None:
        """The figures of every MoE layer, a group per figure, a series per layer; histograms of the
        load over the layer's mean; and one image, whose rows are the layers of ``record`` in their
        order, the blocks in its name. Nothing without experts."""
        if not freq_LE.size:
            return
        for layer, load in record.layers.items():
            flat = load.flat()
            for name in GROUPS["experts"]:
                tag = f"layers_{name}/layer_{layer:02d}"
                self._writer.add_scalar(tag, flat[name], record.step)
        for layer, freq_E in zip(record.layers, freq_LE, strict=True):
            share = freq_E / max(float(freq_E.mean()), 1e-9)
            self._writer.add_histogram(f"experts/load_layer_{layer:02d}", share, record.step)
        first, last = min(record.layers), max(record.layers)
        self._writer.add_image(
            f"experts/load_layer_{first:02d}_to_{last:02d}_by_expert",
            heat_map(freq_LE),
            record.step,
            dataformats="HWC",
        )

    def close(self) -> None:
        self._writer.close()
