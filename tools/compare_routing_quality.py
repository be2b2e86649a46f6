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
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from distmoe.bench.routing_quality import (
    TOP_K,
    WAYS,
    Plan,
    Result,
    Summary,
    as_json,
    plans,
    read_result,
    summarize,
    tile_for,
)
from distmoe.bench.tool import circumstances, console_of, table_of
from distmoe.config import Config, ConfigError, check, load_config, resolve, to_toml

CONFIG = "configs/routing_quality.toml"


def main(argv: Sequence[str] | None = None) -> int:
    arguments, config = _arguments(sys.argv[1:] if argv is None else argv)
    results = []
    todo = list(plans(arguments.ways, arguments.ratios, arguments.seeds, config))
    for number, plan in enumerate(todo, start=1):
        begun = time.perf_counter()
        result = run(plan, arguments)
        if result is None:
            return 1
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


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    cut = list(argv).index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--ways", type=lambda text: text.split(","), default=list(WAYS))
    parser.add_argument("--ratios", type=_numbers, default=[1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--seeds", type=_integers, default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=Path("runs/routing_quality"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args(list(argv)[:cut])
    arguments.settings = list(argv)[cut + 1 :]
    for way in arguments.ways:
        if way not in WAYS:
            parser.error(f"--ways: no way '{way}'; known: {', '.join(WAYS)}")
    if min(arguments.ratios) <= 0:
        parser.error(f"--ratios is {min(arguments.ratios):g}; it must be greater than 0")
    try:
        config = load_config(arguments.config, arguments.settings)
        check(config, config.launch.nproc)
        config = resolve(config)
        for ratio in arguments.ratios:
            tile_for(ratio, config)
    except (ConfigError, ValueError) as error:
        parser.error(str(error))
    return arguments, config


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def run(plan: Plan, arguments: argparse.Namespace) -> Result | None:
    """Train, unless it is done already; None if the training failed."""
    folder = arguments.runs / plan.name
    settings = [*arguments.settings, *plan.options(folder)]
    wanted = to_toml(load_config(arguments.config, settings))
    # Beside the run, and only when it is finished: what it was started with.
    done = folder / "finished.toml"
    if done.is_file() and done.read_text() == wanted:
        return read_result(plan, folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with (folder / "log").open("w") as log:
        code = subprocess.run(
            [sys.executable, "-m", "distmoe", "train", arguments.config, *settings],
            stdout=log,
            stderr=subprocess.STDOUT,
        ).returncode
    if code:
        print((folder / "log").read_text()[-2000:], file=sys.stderr)
        print(f"{plan.name} failed; its log is {folder / 'log'}", file=sys.stderr)
        return None
    # The weights of dozens of runs are of no use to anybody.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    done.write_text(wanted)
    return read_result(plan, folder)


def write(arguments: argparse.Namespace, config: Config, results: list[Result]) -> None:
    if arguments.json:
        facts = {
            **circumstances(),
            "device": config.run.device,
            "ranks": config.launch.nproc,
            "steps": config.train.steps,
            "tokens_a_step": config.train.global_batch_size * config.data.seq_len,
            **as_json(results),
        }
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
