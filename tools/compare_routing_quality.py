"""Validation loss of runs that differ in token rounding alone, against plain top-k.

python tools/compare_routing_quality.py
python tools/compare_routing_quality.py --ways top-k,balance --ratios 2 -- --train.steps 50
python tools/compare_routing_quality.py --json out.json --picture out.png

Every run is `distmoe train` with all its ranks. A finished run is not repeated: the same command
goes on where it was stopped. Options after -- change settings of all runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from finished_runs import facts_of, parse, train_once

from distmoe.arguments import names_of, new_file, positive_number, several
from distmoe.bench.routing_quality import (
    TOP_K,
    WAYS,
    Result,
    Summary,
    as_json,
    plans,
    read_result,
    summarize,
    tile_for,
)
from distmoe.bench.tool import console_of, table_of
from distmoe.config import Config

CONFIG = "configs/routing_quality.toml"


def main(argv: Sequence[str] | None = None) -> int:
    arguments, config = _arguments(argv)
    results = []
    todo = list(plans(arguments.ways, arguments.ratios, arguments.seeds, config))
    for number, plan in enumerate(todo, start=1):
        begun = time.perf_counter()
        folder = arguments.runs / plan.name
        if not train_once(arguments.config, [*arguments.settings, *plan.options()], folder):
            return 1
        result = read_result(plan, folder)
        results.append(result)
        seconds = time.perf_counter() - begun
        print(
            f"{number}/{len(todo)} {plan.name}: validation loss {result.validation_loss:.4f} "
            f"({seconds:.0f} s)",
            flush=True,
        )
        write(arguments, config, results)
    print_table(summarize(results))
    return 0


def _arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--ways", type=names_of(WAYS), default=list(WAYS))
    parser.add_argument("--ratios", type=several(positive_number), default=[1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--picture", type=new_file)
    arguments, config = parse(parser, argv, seeds=[1, 2, 3], runs="runs/routing_quality")
    try:
        for ratio in arguments.ratios:
            tile_for(ratio, config)
    except ValueError as error:
        parser.error(str(error))
    return arguments, config


def write(arguments: argparse.Namespace, config: Config, results: list[Result]) -> None:
    if arguments.json:
        facts = {**facts_of(config), **as_json(results)}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    if arguments.picture:
        draw(summarize(results), arguments.picture)


def print_table(lines: list[Summary]) -> None:
    figures = ("ratio", "tile", "seeds", "loss", "spread", "over top-k", "spread", "pairs moved")
    table = table_of("", "way", (*figures, "tokens without expert"))
    for s in lines:
        plain = s.way == TOP_K
        table.add_row(
            s.way,
            "" if plain else f"{s.ratio:g}",
            "" if plain else str(s.tile),
            str(s.seeds),
            f"{s.loss:.4f}",
            f"{s.spread:.4f}",
            "" if plain or s.over_top_k is None else f"{s.over_top_k:+.4f}",
            "" if plain else f"{s.over_top_k_spread:.4f}",
            f"{s.moved:.1%}",
            f"{s.without_expert:.2%}",
        )
    console_of(120).print(table)


def draw(lines: list[Summary], path: Path) -> None:
    """Loss over that of top-k against the ratio; bars and the band are one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    for way in dict.fromkeys(line.way for line in lines):
        group = sorted((s for s in lines if s.way == way), key=lambda s: s.ratio)
        if way == TOP_K:
            axis.axhspan(-group[0].spread, group[0].spread, color="0.9", label="top-k, its spread")
            axis.axhline(0, color="0.5", linewidth=0.8)
            continue
        axis.errorbar(
            [s.ratio for s in group],
            [s.over_top_k or 0.0 for s in group],
            [s.over_top_k_spread for s in group],
            marker="o",
            capsize=3,
            label=way,
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted({s.ratio for s in lines if s.way != TOP_K}))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("mean tokens per expert / tile")
    axis.set_ylabel("validation loss over that of top-k, nats")
    axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
