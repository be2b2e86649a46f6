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
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distmoe.bench.tool import circumstances
from distmoe.config import Config, ConfigError, check, load_config, resolve, to_toml
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
    arguments, config = _arguments(sys.argv[1:] if argv is None else argv)
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
        arguments.json.write_text(json.dumps(_record(config, runs), indent=1) + "\n")
    return 0


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    cut = list(argv).index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config")
    parser.add_argument("--optimizers", type=lambda text: text.split(","), default=list(OPTIMIZERS))
    parser.add_argument("--rates", type=_numbers, help="peaks of the learning rate")
    parser.add_argument("--seeds", type=_integers, default=[1, 2])
    parser.add_argument("--warm-up", type=int, default=20)
    parser.add_argument("--runs", type=Path, default=Path("runs/optimizers"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(list(argv)[:cut])
    arguments.settings = list(argv)[cut + 1 :]
    for name in arguments.optimizers:
        if name not in OPTIMIZERS:
            parser.error(f"--optimizers: no '{name}'; known: {', '.join(OPTIMIZERS)}")
    try:
        config = load_config(arguments.config, arguments.settings)
        check(config, config.launch.nproc)
    except ConfigError as error:
        parser.error(str(error))
    if arguments.warm_up >= config.train.steps:
        parser.error(
            f"--warm-up is {arguments.warm_up}; it must be below train.steps ({config.train.steps})"
        )
    return arguments, resolve(config, config.launch.nproc)


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _run(arguments: argparse.Namespace, optimizer: str, rate: float, seed: int) -> Run | None:
    """Train, unless it is done already; None if the training failed."""
    folder = arguments.runs / f"{optimizer}-lr-{rate:g}-seed-{seed}"
    settings = [*arguments.settings, "--run.dir", str(folder), "--run.seed", str(seed)]
    settings += ["--optim.name", optimizer, "--optim.lr", str(rate)]
    wanted = to_toml(load_config(arguments.config, settings))
    # Beside the run, and only when it is finished: what it was started with.
    done = folder / "finished.toml"
    if not done.is_file() or done.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command = [sys.executable, "-m", "distmoe", "train", arguments.config, *settings]
        with (folder / "log").open("w") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
        if code:
            print((folder / "log").read_text()[-2000:], file=sys.stderr)
            return None
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        done.write_text(wanted)
    steps = [record for record in _lines(folder, "metrics") if record["step"] > arguments.warm_up]
    validation = {r["step"]: r["validation_loss"] for r in _lines(folder, "validation")}

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


def _lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def _last(run: Run) -> float:
    return run.validation[max(run.validation)]


def _show(runs: list[Run]) -> None:
    steps = sorted({step for run in runs for step in run.validation})
    table = Table(title="validation loss after steps", box=None, title_justify="left")
    for name in ("optimizer", "lr", "seed", *map(str, steps), "step s", "optimizer s", "share"):
        table.add_column(name, justify="left" if name == "optimizer" else "right")
    for run in sorted(runs, key=lambda run: (run.rate, run.seed, run.optimizer)):
        losses = [f"{run.validation[s]:.4f}" if s in run.validation else "" for s in steps]
        cost = [f"{run.step_s:.3f}", f"{run.optimizer_s:.3f}", f"{run.optimizer_share:.1%}"]
        table.add_row(run.optimizer, f"{run.rate:g}", str(run.seed), *losses, *cost)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _record(config: Config, runs: list[Run]) -> dict[str, object]:
    return {
        **circumstances(),
        "ranks": config.launch.nproc,
        "steps": config.train.steps,
        "tokens_a_step": config.train.global_batch_size * config.data.seq_len,
        "runs": [asdict(run) for run in runs],
    }


if __name__ == "__main__":
    sys.exit(main())
