"""Everything that a run writes down, behind one object: console, JSON lines, TensorBoard, W&B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from distmoe.config import Config
from distmoe.engines import compute_dtype
from distmoe.metrics.console import RunConsole
from distmoe.metrics.device_energy import meter_of
from distmoe.metrics.expert_load import IntArray
from distmoe.metrics.flops import flops_per_token, parameter_counts, peak_flops
from distmoe.metrics.record import StepRecord, ValidationRecord
from distmoe.metrics.run_writers import RunWriters
from distmoe.metrics.summary import (
    Rows,
    corpora_rows,
    file_rows,
    loss_rows,
    model_rows,
    speed_rows,
)
from distmoe.metrics.tally import Tally
from distmoe.metrics.throughput import Clock
from distmoe.runtime import pick_device

# With more layers than this, the table at the end has only the worst ones.
MANY_LAYERS = 12
WORST_LAYERS = 8


class Reporter:
    """Every rank calls it; rank 0 prints, and has ``writers``. ``peak``: FLOP/s of this rank's
    device, None where MFU would have no meaning."""

    def __init__(
        self,
        config: Config,
        *,
        console: RunConsole,
        clock: Clock,
        peak: float | None,
        writers: RunWriters | None,
    ) -> None:
        self.config, self.console, self.clock, self.peak = config, console, clock, peak
        self._writers = writers
        self._losses: list[tuple[int, float]] = []
        self._tally = Tally()
        self._last: StepRecord | None = None
        self._validation: float | None = None

    @classmethod
    def open(cls, config: Config, *, rank: int, world: int, resumed_step: int) -> Reporter:
        """For a start that goes on after ``resumed_step``; on rank 0 with the files of the run."""
        console, writers = RunConsole(enabled=rank == 0, steps=config.train.steps), None
        on_gpu = pick_device(config.run.device, 0).type == "cuda"
        name = torch.cuda.get_device_name() if on_gpu else "cpu"
        peak = peak_flops(name) if compute_dtype(config) == torch.bfloat16 else None
        if rank == 0:
            writers = RunWriters.open(
                config,
                resumed_step=resumed_step,
                facts=_start_facts(config, world=world, device=name, peak=peak),
                warn_once=console.warn_once,
            )
        console.begin(resumed_step)
        # Without a number: the GPU that this rank has been given.
        clock = Clock(meter_of(torch.device("cuda" if on_gpu else "cpu")))
        return cls(config, console=console, clock=clock, peak=peak, writers=writers)

    def header(self, facts: Rows) -> None:
        """Model size and routing from the config, and what the trainer found out."""
        rows = model_rows(self.config, peak=self.peak)
        self.console.table(f"distmoe: {self.config.run.name}", rows + facts)

    def step(self, record: StepRecord, freq_LE: IntArray) -> None:
        """One training step; ``freq_LE``: top-k pairs per expert over all ranks."""
        self._losses = [*self._losses[:1], (record.step, record.learned.loss)]
        self._tally.add(record.flat())
        if self._writers is not None:
            self._writers.step(record, freq_LE)
        if is_logged(record.step, self.config) or record.learned.skipped:
            self.console.step(record)
        self._last = record
        if self._layer_table_is_due(record):
            self.console.layers(record)
        self.console.advance(record.step)
        self._warn(record)

    def _layer_table_is_due(self, record: StepRecord) -> bool:
        every = self.config.metrics.layer_table_every
        return bool(record.layers) and every > 0 and record.step % every == 0

    def _warn(self, record: StepRecord) -> None:
        if record.learned.skipped:
            self.console.line(
                f"step {record.step} is SKIPPED, without an update; not finite, first of all: "
                f"{record.not_finite}"
            )
        if self.config.moe.rounding.rule != "none" and record.load.rounding_costs_quality:
            layer, worst = min(
                record.layers.items(), key=lambda item: item[1].tokens_per_expert_over_tile
            )
            more = "larger micro-batches or ep"
            # A larger ep helps only ranks that round together.
            if self.config.moe.rounding.scope == "rank":
                more = "moe.rounding.scope 'ep', larger micro-batches"
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
        if self._writers is not None:
            self._writers.validation(
                ValidationRecord(step, loss, unigram_entropy, seconds, dict(corpora))
            )
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
        if self._writers is not None:
            self._writers.finish(
                stopped, seconds=self.clock.elapsed(), checkpoint_seconds=checkpoint_seconds
            )

    def close(self) -> None:
        """Close the files; again is harmless. Without `finish` before, the start has failed."""
        if self._writers is not None:
            self._writers.close(seconds=self.clock.elapsed())
        self._writers = None
        self.console.end()


def is_logged(step: int, config: Config) -> bool:
    """Whether the console has a line of ``step``, whatever happens in it."""
    return step in (1, config.train.steps) or step % config.metrics.log_every == 0


def _start_facts(config: Config, *, world: int, device: str, peak: float | None) -> dict[str, Any]:
    """What the files' readers cannot know from the config."""
    flops, counts = flops_per_token(config), parameter_counts(config.model, config.moe)
    return {
        "ranks": world,
        "device": device,
        "dtype": str(compute_dtype(config)).removeprefix("torch."),
        "peak_flops": peak,
        "flops_per_token": flops.model,
        "palm_flops_per_token": flops.palm,
        "parameters": counts.total,
        "active_parameters": counts.active,
    }
