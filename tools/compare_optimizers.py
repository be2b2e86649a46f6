"""Runs that differ in optim.name alone: loss at equal steps, and what the update costs.

python tools/compare_optimizers.py configs/quickstart.toml --json out.json -- --train.steps 200
python tools/compare_optimizers.py configs/quickstart.toml --rates 1e-3,3e-3 --seeds 1

Every run is `distmoe train CONFIG` with its own ranks; what follows -- is given to all of them.
Runs of one seed share initial weights and batches. A finished run in --runs is not repeated.
Seconds are medians over the steps after --warm-up, on rank 0. Ends with 2 on a wrong argument, 1 if
a run failed, 0 otherwise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from finished_runs import facts_of, lines_of, parse, train_once

from distmoe.arguments import names_of, several
from distmoe.bench.tool import console_of, table_of
from distmoe.config import Config
from distmoe.registry import OPTIMIZERS


@dataclass(frozen=True)
class Run:
    """``validation``: step -> loss. ``optimizer_share``: of the step's seconds."""

    optimizer: str
    rate: float
    seed: int
    validation: dict[int, float]
    step_s: float
    optimizer_s: float
    optimizer_share: float


def main(argv: Sequence[str] | None = None) -> int:
    arguments, config = _arguments(argv)
    runs = []
    for seed in arguments.seeds:
        for rate in arguments.rates or [config.optim.lr]:
            for optimizer in arguments.optimizers:
                run = _run(arguments, optimizer, rate, seed)
                if run is None:
                    return 1
                runs.append(run)
                print(f"{optimizer}, lr {rate:g}, seed {seed}: {_last(run):.4f}", file=sys.stderr)
    _show(runs)
    if arguments.json:
        facts = {**facts_of(config), "runs": [asdict(run) for run in runs]}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


def _arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config")
    parser.add_argument("--optimizers", type=names_of(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--rates", type=several(float), help="peaks of the learning rate")
    parser.add_argument("--warm-up", type=int, default=20)
    arguments, config = parse(parser, argv, seeds=[1, 2], runs="runs/optimizers")
    if arguments.warm_up >= config.train.steps:
        parser.error(
            f"--warm-up is {arguments.warm_up}; it must be below train.steps ({config.train.steps})"
        )
    return arguments, config


def _run(arguments: argparse.Namespace, optimizer: str, rate: float, seed: int) -> Run | None:
    """None if the training failed."""
    folder = arguments.runs / f"{optimizer}-lr-{rate:g}-seed-{seed}"
    settings = [*arguments.settings, "--run.seed", str(seed)]
    settings += ["--optim.name", optimizer, "--optim.lr", str(rate)]
    if not train_once(arguments.config, settings, folder):
        return None
    steps = [record for record in lines_of(folder, "metrics") if record["step"] > arguments.warm_up]
    validation = {r["step"]: r["validation_loss"] for r in lines_of(folder, "validation")}

    def middle(name: str) -> float:
        return statistics.median(record[name] for record in steps)

    shares = [record["optimizer_seconds"] / record["step_seconds"] for record in steps]
    return Run(
        optimizer=optimizer,
        rate=rate,
        seed=seed,
        validation=validation,
        step_s=middle("step_seconds"),
        optimizer_s=middle("optimizer_seconds"),
        optimizer_share=statistics.median(shares),
    )


def _last(run: Run) -> float:
    return run.validation[max(run.validation)]


def _show(runs: list[Run]) -> None:
    steps = sorted({step for run in runs for step in run.validation})
    figures = ("lr", "seed", *map(str, steps), "step s", "optimizer s", "share")
    table = table_of("validation loss after steps", "optimizer", figures)
    for run in sorted(runs, key=lambda run: (run.rate, run.seed, run.optimizer)):
        losses = [f"{run.validation[s]:.4f}" if s in run.validation else "" for s in steps]
        cost = [f"{run.step_s:.3f}", f"{run.optimizer_s:.3f}", f"{run.optimizer_share:.1%}"]
        table.add_row(run.optimizer, f"{run.rate:g}", str(run.seed), *losses, *cost)
    console_of(120).print(table)


if __name__ == "__main__":
    sys.exit(main())
