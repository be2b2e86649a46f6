"""The words of the header and of the summary."""

from __future__ import annotations

import math
from pathlib import Path

from distmoe.config import Config
from distmoe.metrics.flops import flops_per_token, parameter_counts
from distmoe.metrics.record import StepRecord
from distmoe.metrics.tally import RunFigures
from distmoe.routing.routers import is_forced

Rows = list[tuple[str, str]]


def model_rows(config: Config, *, peak: float | None) -> Rows:
    """Size, experts and FLOPs of the model. ``peak``: FLOP/s of the device, None if unknown."""
    moe, rounding = config.moe, config.moe.rounding
    counts, flops = parameter_counts(config.model, moe), flops_per_token(config)
    tiles = "" if rounding.rule == "none" else f" to tiles of {rounding.tile}"
    factor, what = rounding.capacity_factor, rounding.capacity_of
    most = f", no {what} above {factor:g} times the mean" if factor else ""
    against = "" if peak is None else f", device peak {peak / 1e12:.0f} TFLOP/s in bf16"
    return [
        ("model", f"{counts.total / 1e6:.1f} M parameters, {counts.active / 1e6:.1f} M active"),
        (
            "experts",
            f"{moe.num_experts} per layer, top {moe.top_k}, router {moe.router}, "
            f"rounding {rounding.rule}{tiles}{most}",
        ),
        *routing_rows(config),
        (
            "flops",
            f"{flops.model / 1e6:.1f} MFLOP per token "
            f"({flops.palm / 1e6:.1f} by the PaLM convention){against}",
        ),
    ]


def routing_rows(config: Config) -> Rows:
    """The stamp of figures that say nothing of real routing; none for a real router."""
    if not is_forced(config.moe.router):
        return []
    return [("routing", f"FORCED by router {config.moe.router}: no real routing")]


def speed_rows(config: Config, figures: RunFigures) -> Rows:
    """Medians of the run, and where the time of its steps went."""
    medians, split = figures.medians, figures.split
    seconds = max(sum(split.values()), 1e-9)
    shares = ", ".join(f"{name} {part / seconds:.1%}" for name, part in split.items())
    rows = [
        (
            "median speed",
            f"{medians['tokens_per_second_per_rank']:,.0f} tokens/s/rank on {figures.ranks} ranks, "
            f"{figures.measured} of {figures.steps} steps measured",
        ),
        ("in all", f"{figures.tokens_per_day / 1e6:,.0f} M tokens a day"),
        (
            "TFLOP/s/rank",
            f"{medians['tflops_per_rank']:.3g} "
            f"({medians['palm_tflops_per_rank']:.3g} by the PaLM convention)",
        ),
    ]
    if figures.slowest_rank is not None:
        text = f"{medians['slowest_over_mean']:.2f}x the mean's own time; most often rank "
        rows.append(("slowest rank", f"{text}{figures.slowest_rank}"))
    rows += [("step time", shares), *routing_rows(config)]
    if not math.isnan(figures.joules):
        watts, tokens = figures.energy.watts_per_rank, figures.energy.tokens_per_joule
        whole = f"{figures.kwh:.3g} kWh in the steps"
        rows.append(("energy", f"{watts:,.0f} W/rank, {tokens:,.3g} tokens/J, {whole}"))
    if not math.isnan(medians["mfu"]):
        text = f"{medians['mfu']:.1%} ({medians['palm_mfu']:.1%} by the PaLM convention)"
        rows.append(("MFU", text))
    return rows


def loss_rows(
    losses: list[tuple[int, float]], validation: float | None, unigram_entropy: float
) -> Rows:
    """First and last training loss of this start, as (step, loss), and the validation loss."""
    rows = []
    if losses:
        (first, start), (last, end) = losses[0], losses[-1]
        rows.append(("training loss", f"{start:.4f} (step {first}) -> {end:.4f} (step {last})"))
    if validation is not None:
        gap = unigram_entropy - validation
        rows.append(
            (
                "validation loss",
                f"{validation:.4f}, {abs(gap):.4f} nats {'below' if gap >= 0 else 'ABOVE'} "
                f"the unigram entropy {unigram_entropy:.4f}",
            )
        )
    return rows


def corpora_rows(record: StepRecord | None) -> Rows:
    """What was read of each corpus up to the last step."""
    if record is None or not record.corpora:
        return []
    parts = [f"{c.corpus} {c.samples:,} sequences, {c.epochs:.3g} epochs" for c in record.corpora]
    return [("read", "; ".join(parts))]


def file_rows(config: Config) -> Rows:
    """Where the run left what."""
    folder = Path(config.run.dir)
    rows = [
        ("checkpoint", str(folder / "checkpoints")),
        ("metrics", str(folder / "metrics.jsonl")),
    ]
    if config.metrics.tensorboard:
        rows.append(("pictures", f"tensorboard --logdir {folder / 'tensorboard'}"))
    return rows
