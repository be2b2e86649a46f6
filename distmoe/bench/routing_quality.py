"""What rounding does to the validation loss: runs that differ in rounding alone, and their spread.

A run trains with its way to round and is evaluated with plain top-k, as all training does. Runs of
one seed share initial weights and batches, so a way is compared with top-k seed by seed.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from distmoe.config import Config
from distmoe.config.batch import rank_tokens

TOP_K = "top-k"
# Way to round -> settings under moe.rounding.
WAYS: dict[str, dict[str, str]] = {
    TOP_K: {"rule": "none"},
    "balance": {"rule": "balance"},
    "nearest": {"rule": "nearest"},
    "down": {"rule": "down"},
    "local": {"rule": "balance", "scope": "rank"},
}


@dataclass(frozen=True)
class Plan:
    """One run. ``ratio``: mean tokens per expert and step over the tile; 0 for top-k."""

    way: str
    ratio: float
    tile: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        tile = f"-tile-{self.tile}" if self.way != TOP_K else ""
        return f"{self.way}{tile}-seed-{self.seed}"

    def options(self) -> list[str]:
        """Settings of this run, as options of `distmoe train`."""
        rounding = WAYS[self.way] | ({} if self.way == TOP_K else {"tile": str(self.tile)})
        options = ["--run.seed", str(self.seed)]
        for key, value in rounding.items():
            options += [f"--moe.rounding.{key}", value]
        return options


@dataclass(frozen=True)
class Result:
    """Of one run. Shares are of the pairs and tokens of all steps and layers."""

    plan: Plan
    validation_loss: float
    steps: int
    tokens: int
    dropped: float
    added: float
    without_expert: float


@dataclass(frozen=True)
class Summary:
    """Over the seeds. ``over_top_k``: mean of the losses minus those of top-k, seed by seed;
    ``spread`` and ``over_top_k_spread``: standard deviations."""

    way: str
    ratio: float
    tile: int
    seeds: int
    loss: float
    spread: float
    over_top_k: float | None
    over_top_k_spread: float
    moved: float
    without_expert: float


def tile_for(ratio: float, config: Config) -> int:
    """M at which the tokens of an ep group give an expert ``ratio`` tiles on the mean; ``config``
    is resolved. ValueError if that is no whole number."""
    tokens = rank_tokens(config) * config.parallel.ep
    mean = tokens * config.moe.top_k / config.moe.num_experts
    tile = mean / ratio
    if tile != int(tile) or tile < 1:
        raise ValueError(
            f"ratio is {ratio:g}; it must divide the {mean:g} tokens of an expert into whole tiles"
        )
    return int(tile)


def plans(
    ways: Sequence[str], ratios: Sequence[float], seeds: Sequence[int], config: Config
) -> Iterator[Plan]:
    """Seed by seed, so that the first seed is complete early. Top-k has no tile: a run a seed."""
    for seed in seeds:
        for way in ways:
            if way == TOP_K:
                yield Plan(way, 0.0, 1, seed)
                continue
            for ratio in ratios:
                yield Plan(way, ratio, tile_for(ratio, config), seed)


def read_result(plan: Plan, folder: Path) -> Result:
    """From the files that the finished run left in ``folder``."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = json.loads((folder / "validation.jsonl").read_text().splitlines()[-1])
    pairs = sum(step["pairs"] for step in steps)
    tokens = sum(step["tokens"] for step in steps)
    # Every MoE layer counts its tokens.
    loads = json.loads((folder / "expert_load.jsonl").read_text().splitlines()[-1])
    passes = tokens * len(loads["pairs"])
    return Result(
        plan=plan,
        validation_loss=last["validation_loss"],
        steps=last["step"],
        tokens=tokens,
        dropped=sum(step["pairs_dropped"] for step in steps) / pairs,
        added=sum(step["pairs_added"] for step in steps) / pairs,
        without_expert=sum(step["tokens_without_expert"] for step in steps) / passes,
    )


def summarize(results: Sequence[Result]) -> list[Summary]:
    """A line per way and ratio, top-k first; differences over the seeds that top-k has too, None
    without any."""
    baseline = {r.plan.seed: r.validation_loss for r in results if r.plan.way == TOP_K}
    groups: dict[tuple[str, float, int], list[Result]] = {}
    for result in sorted(results, key=lambda result: result.plan.way != TOP_K):
        plan = result.plan
        groups.setdefault((plan.way, plan.ratio, plan.tile), []).append(result)
    lines = []
    for (way, ratio, tile), group in groups.items():
        losses = [r.validation_loss for r in group]
        above = [
            r.validation_loss - baseline[r.plan.seed] for r in group if r.plan.seed in baseline
        ]
        lines.append(
            Summary(
                way=way,
                ratio=ratio,
                tile=tile,
                seeds=len(group),
                loss=statistics.fmean(losses),
                spread=_spread(losses),
                over_top_k=statistics.fmean(above) if above else None,
                over_top_k_spread=_spread(above),
                moved=statistics.fmean(r.dropped + r.added for r in group),
                without_expert=statistics.fmean(r.without_expert for r in group),
            )
        )
    return lines


def _spread(values: Sequence[float]) -> float:
    """Standard deviation of a sample; 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def as_json(results: Sequence[Result]) -> dict[str, object]:
    """Runs and summary, without nesting."""
    runs = [
        {**asdict(r.plan), **{k: v for k, v in vars(r).items() if k != "plan"}} for r in results
    ]
    return {"summary": [asdict(s) for s in summarize(results)], "runs": runs}
