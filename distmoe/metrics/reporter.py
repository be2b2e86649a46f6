"""Everything that a run writes down, behind one object: console, JSON lines, TensorBoard, W&B."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from distmoe.config import Config
from distmoe.engines import compute_dtype
from distmoe.metrics.console import RunConsole
from distmoe.metrics.device_energy import meter_of
from distmoe.metrics.expert_load import IntArray
from distmoe.metrics.flops import flops_per_token, parameter_counts, peak_flops
from distmoe.metrics.record import StepRecord
from distmoe.metrics.starts import ERROR, StartLog
from distmoe.metrics.summary import (
    Rows,
    corpora_rows,
    file_rows,
    loss_rows,
    model_rows,
    routing_rows,
    speed_rows,
)
from distmoe.metrics.tally import Tally
from distmoe.metrics.throughput import Clock
from distmoe.metrics.wandb_writer import WandbWriter
from distmoe.metrics.writers import JsonlWriter, TensorBoardWriter
from distmoe.runtime import pick_device

Writer = TypeVar("Writer")

# With more layers than this, the table at the end has only the worst ones.
MANY_LAYERS = 12
WORST_LAYERS = 8


class Reporter:
    """Rank 0 writes and prints; on the other ranks every call does nothing that is seen.

    Files under run.dir: metrics.jsonl (a line per step), validation.jsonl (a line per validation),
    expert_load.jsonl (pairs of every expert and figures of every layer, now and then), starts.jsonl
    (two lines a start) and tensorboard/. Lines of steps after ``resumed_step`` are cut first.
    ``peak``: FLOP/s of this rank's device, None where MFU would have no meaning.
    """

    def __init__(self, config: Config, *, rank: int, world: int, resumed_step: int) -> None:
        self.config, self.world = config, world
        self.clock = Clock(meter_of(_own_device(config)))
        self.console = RunConsole(
            enabled=rank == 0, steps=config.train.steps, first_step=resumed_step
        )
        self.peak = _bf16_peak(config)
        self._losses: list[tuple[int, float]] = []
        self._tally = Tally()
        self._last: StepRecord | None = None
        self._validation: float | None = None
        self._steps: JsonlWriter | None = None
        self._validations: JsonlWriter | None = None
        self._loads: JsonlWriter | None = None
        self._starts: StartLog | None = None
        self._tensorboard: TensorBoardWriter | None = None
        self._wandb: WandbWriter | None = None
        if rank == 0:
            self._open(Path(config.run.dir), resumed_step)

    def _open(self, folder: Path, resumed_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._steps = JsonlWriter(folder / "metrics.jsonl", resumed_step=resumed_step)
        self._validations = JsonlWriter(folder / "validation.jsonl", resumed_step=resumed_step)
        self._loads = JsonlWriter(folder / "expert_load.jsonl", resumed_step=resumed_step)
        self._starts = StartLog(
            folder / "starts.jsonl", resumed_step=resumed_step, facts=self._start_facts()
        )
        if self.config.metrics.tensorboard:
            self._tensorboard = TensorBoardWriter(folder / "tensorboard", resumed_step=resumed_step)
            for name, text in routing_rows(self.config):
                self._tensorboard.text(name, text, resumed_step)
        if self.config.metrics.wandb:
            self._wandb = WandbWriter(self.config, resumed_step=resumed_step)

    def _start_facts(self) -> dict[str, Any]:
        """What the files' readers cannot know from the config."""
        config, device = self.config, pick_device(self.config.run.device, 0)
        flops, counts = flops_per_token(config), parameter_counts(config.model, config.moe)
        on_gpu = device.type == "cuda"
        return {
            "ranks": self.world,
            "device": torch.cuda.get_device_name() if on_gpu else device.type,
            "dtype": str(compute_dtype(config, device)).removeprefix("torch."),
            "peak_flops": self.peak,
            "flops_per_token": flops.model,
            "palm_flops_per_token": flops.palm,
            "parameters": counts.total,
            "active_parameters": counts.active,
        }

    def header(self, facts: Rows) -> None:
        """Model size and routing from the config, and what the trainer found out."""
        rows = model_rows(self.config, peak=self.peak)
        self.console.table(f"distmoe: {self.config.run.name}", rows + facts)

    def step(self, record: StepRecord, freq_LE: IntArray) -> None:
        """One training step; ``freq_LE``: top-k pairs per expert over all ranks."""
        self._losses = [*self._losses[:1], (record.step, record.loss)]
        self._tally.add(record.flat())
        if self._starts is not None:
            self._starts.at(record.step)
        self._put("metrics.jsonl", self._steps, lambda to: to.write(record.line()))
        self._put("tensorboard", self._tensorboard, lambda to: to.write(record))
        self._put("wandb", self._wandb, lambda to: to.write(record))
        is_due = record.step % self.config.metrics.expert_load_every == 0
        if is_due:
            self._put("tensorboard", self._tensorboard, lambda to: to.experts(record, freq_LE))
        if is_due or record.step == self.config.train.steps:
            self._put(
                "expert_load.jsonl",
                self._loads,
                lambda to: to.write(_load_line(record, freq_LE)),
            )
        if is_logged(record.step, self.config) or record.skipped:
            self.console.step(record)
        self._last = record
        if self._layer_table_is_due(record):
            self.console.layers(record)
        self.console.advance(record.step)
        self._warn(record)

    def _put(self, name: str, writer: Writer | None, put: Callable[[Writer], None]) -> None:
        """``put`` something into ``writer``, if there is one. An error of the disk is told once,
        and costs no training; lines of JSON stay in memory until one can be written."""
        try:
            if writer is not None:
                put(writer)
        except OSError as error:
            self.console.warn_once(
                name, f"{name} in {self.config.run.dir} is NOT written: {error}; training goes on"
            )

    def _layer_table_is_due(self, record: StepRecord) -> bool:
        every = self.config.metrics.layer_table_every
        return bool(record.layers) and every > 0 and record.step % every == 0

    def _warn(self, record: StepRecord) -> None:
        if record.skipped:
            self.console.line(
                f"step {record.step} is SKIPPED, without an update; not finite, first of all: "
                f"{record.not_finite}"
            )
        if self.config.moe.rounding.rule != "none" and record.load.rounding_costs_quality:
            layer, worst = min(
                record.layers.items(), key=lambda item: item[1].tokens_per_expert_over_tile
            )
            # A larger ep helps only ranks that round together.
            alone = self.config.moe.rounding.scope == "rank"
            more = (
                "moe.rounding.scope 'ep', larger micro-batches"
                if alone
                else ("larger micro-batches or ep")
            )
            self.console.warn_once(
                "rounding",
                f"mean tokens per expert / tile is {worst.tokens_per_expert_over_tile:.2f} in "
                f"layer {layer}, the worst; below 2 rounding costs quality: {more}, or a smaller "
                "moe.rounding.tile",
            )

    def validation(
        self,
        step: int,
        loss: float,
        unigram_entropy: float,
        *,
        seconds: float,
        corpora: Mapping[str, float] | None = None,
    ) -> None:
        """A validation loss, beside the entropy that knowing token frequencies alone would give;
        ``seconds`` that it took; ``corpora``: the losses of the corpora of a mix."""
        self._validation, corpora = loss, corpora or {}
        line = {
            "step": step,
            "validation_loss": loss,
            "unigram_entropy": unigram_entropy,
            "seconds": seconds,
            "corpora": dict(corpora),
        }
        self._put("validation.jsonl", self._validations, lambda to: to.write(line))
        self._put("tensorboard", self._tensorboard, lambda to: to.validation(step, loss, corpora))
        self._put("wandb", self._wandb, lambda to: to.validation(step, loss, corpora))
        self.console.line(
            f"validation at step {step}: loss {loss:.4f} "
            f"(unigram entropy of the text {unigram_entropy:.4f})"
            + "".join(f", {corpus} {own_loss:.4f}" for corpus, own_loss in corpora.items())
        )

    def finish(
        self,
        *,
        step: int,
        unigram_entropy: float,
        saving: str = "",
        checkpoint_seconds: float = 0.0,
        stopped: str = "",
    ) -> None:
        """The layers of the last step, and the summary. ``saving``: what checkpoints cost;
        ``checkpoint_seconds``: of it, after the last step; ``stopped``: by what, if steps are left.
        """
        self.console.close()
        last = self._last
        if last is not None and last.layers and not self._layer_table_is_due(last):
            many = len(last.layers) > MANY_LAYERS
            self.console.layers(last, most=WORST_LAYERS if many else None)
        rows = loss_rows(self._losses, self._validation, unigram_entropy)
        if self._tally:
            rows += speed_rows(self.config, self._tally.figures())
        parts = ", ".join(f"{name} {s:.1f} s" for name, s in self.clock.parts.items())
        rows += [("time", f"{self.clock.elapsed():.1f} s: {parts}")]
        rows += corpora_rows(last)
        rows += [("saving", saving)] if saving else []
        rows += file_rows(self.config)
        self.console.table(f"done at step {step}", rows)
        self._end_start(stopped, checkpoint_seconds=checkpoint_seconds)
        self._put("wandb", self._wandb, lambda to: to.end(failed=False))

    def close(self) -> None:
        """Close the files; again is harmless. Without `finish` before, the start has failed."""
        self._end_start(ERROR)
        self._put("wandb", self._wandb, lambda to: to.end(failed=True))
        for lines in (self._steps, self._validations, self._loads):
            self._put("the end of metrics", lines, lambda to: to.close())
        self._put("the end of metrics", self._tensorboard, lambda to: to.close())
        self._steps = self._validations = self._loads = self._tensorboard = self._starts = None
        self._wandb = None
        self.console.end()

    def _end_start(self, stopped: str, *, checkpoint_seconds: float = 0.0) -> None:
        seconds = self.clock.elapsed()
        self._put(
            "starts.jsonl",
            self._starts,
            lambda to: to.end(stopped, seconds=seconds, checkpoint_seconds=checkpoint_seconds),
        )


def _load_line(record: StepRecord, freq_LE: IntArray) -> dict[str, Any]:
    pairs = dict(zip(record.layers, freq_LE.tolist(), strict=True))
    return {"step": record.step, "pairs": pairs, "layers": record.layer_lines()}


def is_logged(step: int, config: Config) -> bool:
    """Whether the console has a line of ``step``, whatever happens in it."""
    return step in (1, config.train.steps) or step % config.metrics.log_every == 0


def _own_device(config: Config) -> torch.device:
    """The one that this rank has been given."""
    device = pick_device(config.run.device, 0)
    return torch.device("cuda") if device.type == "cuda" else device


def _bf16_peak(config: Config) -> float | None:
    """FLOP/s of this rank's device, None where MFU would have no meaning or no known peak."""
    device = pick_device(config.run.device, 0)
    if device.type != "cuda" or compute_dtype(config, device) != torch.bfloat16:
        return None
    return peak_flops(torch.cuda.get_device_name())
