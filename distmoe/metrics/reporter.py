"""Everything that a run writes down, behind one object: console, metrics.jsonl, TensorBoard."""

from __future__ import annotations

from pathlib import Path

from distmoe.config import Config
from distmoe.metrics.console import RunConsole
from distmoe.metrics.expert_load import IntArray
from distmoe.metrics.flops import flops_per_token, parameter_counts
from distmoe.metrics.record import StepRecord
from distmoe.metrics.throughput import Clock, median_step_seconds, tokens_per_second_per_rank
from distmoe.metrics.writers import JsonlWriter, TensorBoardWriter


class Reporter:
    """Rank 0 writes and prints; on the other ranks every call does nothing."""

    def __init__(self, config: Config, *, rank: int, world: int, resumed_step: int) -> None:
        self.config, self.world = config, world
        self.clock = Clock()
        self.console = RunConsole(
            enabled=rank == 0, steps=config.train.steps, first_step=resumed_step
        )
        self.losses: list[float] = []
        self.validations: list[float] = []
        self._jsonl: JsonlWriter | None = None
        self._tensorboard: TensorBoardWriter | None = None
        if rank == 0:
            folder = Path(config.run.dir)
            self._jsonl = JsonlWriter(folder / "metrics.jsonl", resumed_step=resumed_step)
            if config.metrics.tensorboard:
                self._tensorboard = TensorBoardWriter(
                    folder / "tensorboard", resumed_step=resumed_step
                )

    def header(self, facts: list[tuple[str, str]]) -> None:
        """Model size and routing from the config, and what the trainer found out."""
        moe, counts = self.config.moe, parameter_counts(self.config)
        rounding = moe.rounding
        rows = [
            ("model", f"{counts.total / 1e6:.1f} M parameters, {counts.active / 1e6:.1f} M active"),
            (
                "experts",
                f"{moe.num_experts} per layer, top {moe.top_k}, router {moe.router}, "
                f"rounding {rounding.rule}"
                + ("" if rounding.rule == "none" else f" to tiles of {rounding.tile}"),
            ),
            (
                "flops",
                f"{flops_per_token(self.config).causal / 1e6:.1f} MFLOP per token "
                f"({flops_per_token(self.config).palm / 1e6:.1f} by the PaLM convention)",
            ),
            *facts,
        ]
        self.console.table(f"distmoe: {self.config.run.name}", rows)

    def step(self, record: StepRecord, freq_LE: IntArray) -> None:
        """One training step; ``freq_LE``: top-k pairs per expert over all ranks."""
        metrics = self.config.metrics
        self.losses.append(record.loss)
        if self._jsonl is not None:
            self._jsonl.write(record.flat())
        if self._tensorboard is not None:
            self._tensorboard.write(record)
            if record.step % metrics.expert_load_every == 0:
                self._tensorboard.expert_load(record.step, freq_LE)
        last = record.step == self.config.train.steps
        if record.step % metrics.log_every == 0 or record.step == 1 or last or record.skipped:
            self.console.step(record)
        self.console.advance(record.step)
        ratio = record.load.tokens_per_expert_over_tile
        if self.config.moe.rounding.rule != "none" and ratio < 2:
            self.console.warn_once(
                f"mean tokens per expert / tile is {ratio:.2f}; below 2 rounding costs quality: "
                "larger micro-batches or ep, or a smaller moe.rounding.tile"
            )

    def validation(self, step: int, loss: float, unigram_entropy: float) -> None:
        """A validation loss, beside the entropy that knowing token frequencies alone would give."""
        self.validations.append(loss)
        if self._tensorboard is not None:
            self._tensorboard.validation(step, loss)
        self.console.line(
            f"validation at step {step}: loss {loss:.4f} "
            f"(unigram entropy of the text {unigram_entropy:.4f})"
        )

    def finish(self, *, step: int, unigram_entropy: float, tokens_per_step: int) -> None:
        """The summary."""
        self.console.close()
        folder = Path(self.config.run.dir)
        rows = []
        if self.losses:
            rows.append(("training loss", f"{self.losses[0]:.4f} -> {self.losses[-1]:.4f}"))
        if self.validations:
            below = unigram_entropy - self.validations[-1]
            rows.append(
                (
                    "validation loss",
                    f"{self.validations[-1]:.4f}, {below:.4f} nats below the unigram entropy "
                    f"{unigram_entropy:.4f}",
                )
            )
        if self.clock.steps:
            seconds = median_step_seconds(self.clock.steps)
            speed = tokens_per_second_per_rank(tokens_per_step, seconds, self.world)
            rows.append(("median speed", f"{speed:,.0f} tokens/s/rank on {self.world} ranks"))
        parts = ", ".join(f"{name} {s:.1f} s" for name, s in self.clock.parts.items())
        rows += [
            ("time", f"{self.clock.elapsed():.1f} s: {parts}"),
            ("checkpoint", str(folder / "checkpoints")),
            ("metrics", str(folder / "metrics.jsonl")),
            ("pictures", f"tensorboard --logdir {folder / 'tensorboard'}"),
        ]
        self.console.table(f"done at step {step}", rows)

    def close(self) -> None:
        """Close the files; again is harmless."""
        self.console.close()
        for writer in (self._jsonl, self._tensorboard):
            if writer is not None:
                writer.close()
        self._jsonl = self._tensorboard = None
