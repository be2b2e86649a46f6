"""Tables and facts of a routing simulation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from distmoe.bench.routing_simulation import TOP_K, Outcome, Setting
from distmoe.bench.tool import console_of, table_of

Result = tuple[Setting, list[Outcome]]


def title(setting: Setting) -> str:
    """Sizes of a setting, and where its scores are from."""
    s = setting
    source = f"layer {s.layer}: " if s.layer is not None else ""
    skew = f", skew {s.skew}" if s.skew is not None else ""
    return (
        f"{source}P={s.ranks} E={s.num_experts} K={s.top_k} T={s.tokens} a rank, M={s.tile}"
        f"{skew}: {s.tokens_per_expert_over_tile:.1f} tiles an expert"
    )


def print_result(result: Result) -> None:
    """One setting: a row per way to round. The worst is over the populations of a trace."""
    setting, outcomes = result
    traced = setting.layer is not None
    heads = ["busiest", "mean", "busiest/mean", *(["worst"] if traced else []), "padding"]
    heads += ["dropped", "added", "score lost", "score added", "no expert"]
    table = table_of(title(setting), "", heads)
    for o in outcomes:
        cells = [f"{o.busiest_tiles:.4g}", f"{o.mean_tiles:.4g}", f"{o.busiest_over_mean:.3f}"]
        cells += [f"{o.worst_busiest_over_mean:.3f}"] if traced else []
        cells += [f"{o.waste:.1%}", f"{o.dropped:.2%}", f"{o.added:.2%}"]
        cells += [f"{o.score_lost:.2%}", f"{o.score_added:.2%}", f"{o.tokens_without_expert:.4g}"]
        table.add_row(o.name, *cells)
    console_of(130).print(table)


def print_summary(results: list[Result]) -> None:
    """One line a setting: padding of top-k, then of every way the busiest rank over the mean and,
    in brackets, the share of the pairs that it moves."""
    names = [outcome.name for outcome in results[0][1]]
    heading = "all settings: busiest rank over the mean (pairs moved)"
    table = table_of(heading, "setting", ["padding of top-k", *names])
    labels = varying([setting for setting, _ in results])
    for label, (_, outcomes) in zip(labels, results, strict=True):
        cells = [f"{o.busiest_over_mean:.3f} ({o.dropped + o.added:.1%})" for o in outcomes]
        padding = next(o.waste for o in outcomes if o.name == TOP_K)
        table.add_row(label, f"{padding:.1%}", *cells)
    console_of(60 + 16 * len(names)).print(table)


def varying(settings: list[Setting]) -> list[str]:
    """A label for each setting, of the sizes in which they differ."""
    names = {"layer": "layer", "ranks": "P", "num_experts": "E", "top_k": "K", "tokens": "T"}
    names |= {"tile": "M", "skew": "skew"}
    for field in list(names):
        if len({getattr(setting, field) for setting in settings}) == 1:
            del names[field]
    return [
        ", ".join(f"{name} {getattr(s, field)}" for field, name in names.items()) for s in settings
    ]


def as_json(results: list[Result], **facts: Any) -> dict[str, Any]:
    """``facts``, and every setting with its outcomes."""
    return {**facts, "settings": list(_settings(results))}


def _settings(results: list[Result]) -> Iterator[dict[str, Any]]:
    for setting, outcomes in results:
        sizes = {name: value for name, value in asdict(setting).items() if value is not None}
        yield {**sizes, "outcomes": [asdict(outcome) for outcome in outcomes]}
