"""The files that rank 0 of a run writes its figures to, and its run of W&B."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distmoe.config import Config
from distmoe.metrics.expert_load import IntArray
from distmoe.metrics.record import StepRecord, ValidationRecord
from distmoe.metrics.starts import ERROR, StartLog
from distmoe.metrics.summary import routing_rows
from distmoe.metrics.wandb_writer import WandbWriter
from distmoe.metrics.writers import JsonlWriter, TensorBoardWriter


@dataclass(frozen=True)
class RunWriters:
    """Open until `close`. Under run.dir: ``steps``: metrics.jsonl (a line per step);
    ``validations``: validation.jsonl (a line per validation); ``loads``: expert_load.jsonl (pairs
    of every expert and figures of every layer, now and then); ``starts``: starts.jsonl (two lines a
    start); tensorboard/. None: not asked for. ``warn_once``: takes a name and what is to be said.
    """

    config: Config
    steps: JsonlWriter
    validations: JsonlWriter
    loads: JsonlWriter
    starts: StartLog
    tensorboard: TensorBoardWriter | None
    wandb: WandbWriter | None
    warn_once: Callable[[str, str], None]

    @classmethod
    def open(
        cls,
        config: Config,
        *,
        resumed_step: int,
        facts: dict[str, Any],
        warn_once: Callable[[str, str], None],
    ) -> RunWriters:
        """Lines of steps after ``resumed_step`` are cut first; ``facts``: of this start."""
        folder, metrics = Path(config.run.dir), config.metrics
        folder.mkdir(parents=True, exist_ok=True)
        steps, validations, loads = (
            JsonlWriter.open(folder / name, resumed_step=resumed_step)
            for name in ("metrics.jsonl", "validation.jsonl", "expert_load.jsonl")
        )
        starts = StartLog.open(folder / "starts.jsonl", resumed_step=resumed_step, facts=facts)
        tensorboard = _tensorboard(config, resumed_step) if metrics.tensorboard else None
        wandb = WandbWriter.open(config, resumed_step=resumed_step) if metrics.wandb else None
        return cls(config, steps, validations, loads, starts, tensorboard, wandb, warn_once)

    def step(self, record: StepRecord, freq_LE: IntArray) -> None:
        """One training step; ``freq_LE``: top-k pairs per expert over all ranks."""
        self.starts.at(record.step)
        loads_are_due = record.step % self.config.metrics.expert_load_every == 0
        with self._told("metrics.jsonl"):
            self.steps.write(record.line())
        self._draw(record)
        if self.tensorboard is not None and loads_are_due:
            with self._told("tensorboard"):
                self.tensorboard.experts(record, freq_LE)
        if loads_are_due or record.step == self.config.train.steps:
            with self._told("expert_load.jsonl"):
                self.loads.write(record.load_line(freq_LE))

    def validation(self, record: ValidationRecord) -> None:
        with self._told("validation.jsonl"):
            self.validations.write(record.line())
        self._draw(record)

    def _draw(self, record: StepRecord | ValidationRecord) -> None:
        for name, curves in (("tensorboard", self.tensorboard), ("wandb", self.wandb)):
            if curves is not None:
                with self._told(name):
                    curves.write(record)

    def finish(self, stopped: str, *, seconds: float, checkpoint_seconds: float) -> None:
        """The start has ended as it should; see `StartLog.end`."""
        with self._told("starts.jsonl"):
            self.starts.end(stopped, seconds=seconds, checkpoint_seconds=checkpoint_seconds)
        if self.wandb is not None:
            with self._told("wandb"):
                self.wandb.end(failed=False)

    def close(self, *, seconds: float) -> None:
        """Close the files. Without `finish` before, the start has failed, after ``seconds``."""
        with self._told("starts.jsonl"):
            self.starts.end(ERROR, seconds=seconds)
        if self.wandb is not None:
            with self._told("wandb"):
                self.wandb.end(failed=True)
        for writer in (self.steps, self.validations, self.loads, self.tensorboard):
            if writer is not None:
                with self._told("the end of metrics"):
                    writer.close()

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """An error of the disk is told once, and costs no training. Lines of JSON stay in memory
        until one can be written."""
        try:
            yield
        except OSError as error:
            folder = self.config.run.dir
            self.warn_once(name, f"{name} in {folder} is NOT written: {error}; training goes on")


def _tensorboard(config: Config, resumed_step: int) -> TensorBoardWriter:
    folder = Path(config.run.dir) / "tensorboard"
    writer = TensorBoardWriter.open(folder, resumed_step=resumed_step)
    for name, text in routing_rows(config):
        writer.text(name, text, resumed_step)
    return writer
