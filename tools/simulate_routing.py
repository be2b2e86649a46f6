"""What each rounding rule does to the tiles of every rank, on synthetic routing.

python tools/simulate_routing.py
python tools/simulate_routing.py --ranks 64 --experts 512 --tokens 8192 --skew 0,0.5,1
python tools/simulate_routing.py --json out.json --picture out.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distmoe.planner.routing_simulation import Outcome, Setting, simulate, synthetic_scores
from distmoe.registry import ROUNDING_RULES


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    results = []
    for skew in arguments.skew:
        setting = Setting(
            tokens=arguments.tokens,
            num_experts=arguments.experts,
            top_k=arguments.top_k,
            ranks=arguments.ranks,
            tile=arguments.tile,
            skew=skew,
        )
        score_TE = synthetic_scores(setting, seed=arguments.seed)
        outcomes = list(simulate(setting, score_TE, arguments.rules))
        print_table(setting, outcomes)
        results.append((setting, outcomes))
    if arguments.json:
        arguments.json.write_text(json.dumps(_as_json(results), indent=1) + "\n")
    if arguments.picture:
        draw(results, arguments.picture)
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    sizes = {"ranks": 8, "experts": 256, "top_k": 8, "tokens": 2048, "tile": 128}
    for name, default in sizes.items():
        what = "tokens of one rank" if name == "tokens" else name.replace("_", "-")
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} ({default})")
    parser.add_argument("--skew", type=_numbers, default=[0.0, 0.3, 1.0], help="0,0.3,1")
    rules = [name for name in ROUNDING_RULES if name != "none"]
    parser.add_argument("--rules", type=lambda text: text.split(","), default=rules)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args(argv)
    for name in sizes:
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    if arguments.experts % arguments.ranks:
        parser.error(
            f"--experts is {arguments.experts}; --ranks ({arguments.ranks}) must divide it"
        )
    if arguments.top_k > arguments.experts:
        parser.error(f"--top_k is {arguments.top_k}; it must be at most {arguments.experts}")
    for rule in arguments.rules:
        if rule not in ROUNDING_RULES:
            parser.error(f"--rules: no rule {rule!r}; known: {', '.join(ROUNDING_RULES)}")
    return arguments


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def print_table(setting: Setting, outcomes: list[Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table

    s = setting
    title = (
        f"P={s.ranks} E={s.num_experts} K={s.top_k} T={s.tokens} a rank, M={s.tile}, "
        f"skew {s.skew}: {s.tokens_per_expert_over_tile:.1f} tiles an expert"
    )
    table = Table(title=title, box=None, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("busiest", "mean", "busiest/mean", "padding", "dropped", "added", "score lost"):
        table.add_column(name, justify="right")
    table.add_column("tokens without expert", justify="right")
    for o in outcomes:
        table.add_row(
            o.name,
            str(o.busiest_tiles),
            f"{o.mean_tiles:.1f}",
            f"{o.busiest_over_mean:.3f}",
            f"{o.waste:.1%}",
            f"{o.dropped:.2%}",
            f"{o.added:.2%}",
            f"{o.score_lost:.2%}",
            str(o.tokens_without_expert),
        )
    Console(width=None if sys.stdout.isatty() else 130).print(table)


def _as_json(results: list[tuple[Setting, list[Outcome]]]) -> dict[str, Any]:
    return {
        "command": " ".join(["python", *sys.argv]),
        "settings": [
            {**asdict(setting), "outcomes": [asdict(outcome) for outcome in outcomes]}
            for setting, outcomes in results
        ],
    }


def draw(results: list[tuple[Setting, list[Outcome]]], path: Path) -> None:
    """Tiles that the busiest rank runs, over the least possible: those of top-k's pairs / P."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    names = [outcome.name for outcome in results[0][1]]
    width = 0.8 / len(results)
    for i, (setting, outcomes) in enumerate(results):
        even = setting.tokens * setting.top_k / setting.tile
        place = [n + i * width for n in range(len(names))]
        axes[0].bar(place, [o.busiest_tiles / even for o in outcomes], width)
        moved = [100 * (o.dropped + o.added) for o in outcomes]
        axes[1].bar(place, moved, width, label=f"skew {setting.skew}")
    axes[0].set_title("tiles of the busiest rank / even share")
    axes[0].axhline(1, color="black", linewidth=0.8)
    axes[0].set_ylim(bottom=0.8)
    axes[1].legend(loc="upper left")
    axes[1].set_title("pairs moved, % of top-k")
    for axis in axes:
        middle = [n + 0.4 - width / 2 for n in range(len(names))]
        axis.set_xticks(middle, names, rotation=30, ha="right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
