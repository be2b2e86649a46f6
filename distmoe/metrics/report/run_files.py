"""The files of a run's folder, checked line by line."""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distmoe.metrics.record import OF_SOME_STEPS
from distmoe.metrics.starts import END, START
from distmoe.metrics.tally import MEDIANS, SUMS, RunFigures, Tally

# What the pictures draw of every step.
DRAWN = ("step", "loss", "tokens_per_second_per_rank", "exposed_share", "warm_up")

FLAGS, WORDS = ("warm_up", "skipped"), ("routing", "event", "device", "dtype", "stopped")
# What a run's figures are made of, beside SUMS, MEDIANS and FLAGS.
OF_A_STEP = ("step", "loss", "ranks", "slowest_rank", "memory_gib", "energy_joules", "routing")
OF_A_VALIDATION = ("step", "validation_loss", "unigram_entropy", "seconds")
# JSON has no nan: what a step or a device may not have is null.
MAY_BE_NULL = ("loss", *OF_SOME_STEPS, "validation_loss", "peak_flops")


class ReportError(ValueError):
    """A folder that is no run, or a file that is not as a run writes it."""


class NoStepsError(ReportError):
    """A run that has not finished its first step."""


@dataclass(frozen=True)
class Run:
    """``config``: by dotted key. ``steps``: DRAWN of every step. ``loads``: pairs of every expert
    [E] by layer, of the last step that has them. ``written``: when the last step was, Unix time."""

    name: str
    config: dict[str, Any]
    figures: RunFigures
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    loads: dict[int, list[int]]
    loads_step: int
    written: float

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The facts of every start."""
        return [event for event in self.events if event["event"] == START]

    @property
    def ends(self) -> list[dict[str, Any]]:
        """How starts ended; a killed one has no end."""
        return [event for event in self.events if event["event"] == END]

    @property
    def ended(self) -> bool:
        """Whether the last start has come to an end of its own."""
        return bool(self.events[-1]["event"] == END)

    @property
    def state(self) -> str:
        """One of: done, stopped by what, running or killed."""
        if not self.ended:
            age = max(time.time() - self.written, 0.0)
            return f"running or killed; last step {age:,.0f} s ago"
        stopped = self.ends[-1]["stopped"]
        return f"stopped by {stopped}" if stopped else "done"


def read_run(folder: Path) -> Run:
    """The run of ``folder``. ReportError names the file and the line of what is wrong."""
    config = _read_config(folder)
    tally = Tally()
    steps: list[dict[str, Any]] = []
    names = (*OF_A_STEP, *SUMS, *MEDIANS, *FLAGS)
    for where, line in _lines(folder / "metrics.jsonl", *names):
        if steps and line["step"] <= steps[-1]["step"]:
            raise ReportError(
                f"{where}: 'step' is {line['step']}; it must be above {steps[-1]['step']}"
            )
        tally.add(line)
        steps.append({name: line[name] for name in DRAWN})
    if not steps:
        raise NoStepsError(f"{folder / 'metrics.jsonl'} has no step yet")
    loads_step, loads = _last_loads(folder / "expert_load.jsonl")
    return Run(
        name=str(folder),
        config=config,
        figures=tally.figures(),
        steps=steps,
        validations=[line for _, line in _lines(folder / "validation.jsonl", *OF_A_VALIDATION)],
        events=_events(folder / "starts.jsonl"),
        loads=loads,
        loads_step=loads_step,
        written=(folder / "metrics.jsonl").stat().st_mtime,
    )


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs: one value a run, None where it has none. Where
    a run lies and what it is called is no difference."""
    keys = {key for run in runs for key in run.config} - {"run.dir", "run.name"}
    values = {key: [run.config.get(key) for run in runs] for key in sorted(keys)}
    return {key: of_runs for key, of_runs in values.items() if of_runs != of_runs[:1] * len(runs)}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.toml"
    try:
        nested = tomllib.loads(_text(path))
    except tomllib.TOMLDecodeError as error:
        # Its text ends in the line and the column.
        raise ReportError(f"{path}: {error}") from error
    return dict(_flat(nested, ""))


def _flat(nested: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in nested.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _events(path: Path) -> list[dict[str, Any]]:
    found = []
    for where, line in _lines(path, "step", "time", "event"):
        if line["event"] == START:
            _check(where, line, "ranks", "peak_flops", "device", "dtype")
        elif line["event"] == END:
            _check(where, line, "checkpoint_seconds", "stopped")
        else:
            allowed = f"{START} or {END}"
            raise ReportError(f"{where}: 'event' is '{line['event']}'; it must be {allowed}")
        found.append(line)
    if not found or found[0]["event"] != START:
        raise ReportError(f"{path}, line 1: it must be of a {START}")
    return found


def _last_loads(path: Path) -> tuple[int, dict[int, list[int]]]:
    step, loads = 0, {}
    for where, line in _lines(path, "step"):
        pairs = line.get("pairs")
        if not isinstance(pairs, dict):
            raise ReportError(f"{where}: 'pairs' is {pairs!r}; it must be an object of layers")
        step, loads = line["step"], {int(layer): counts for layer, counts in pairs.items()}
    return step, loads


def _lines(path: Path, *names: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every line, which must have ``names``, with where it is. A last line without an end is being
    written, or was cut off by a kill; a resume takes it away."""
    for number, line in enumerate(_text(path).splitlines(keepends=True), 1):
        where = f"{path}, line {number}"
        if not line.endswith("\n"):
            return
        try:
            values = json.loads(line)
        except ValueError as error:
            raise ReportError(f"{where}: no JSON: {error}") from error
        if not isinstance(values, dict):
            raise ReportError(f"{where}: it must be an object, and is {line.strip()[:40]}")
        _check(where, values, *names)
        yield where, values


def _text(path: Path) -> str:
    if not path.parent.is_dir():
        raise ReportError(f"{path.parent}: there is no such folder")
    if not path.is_file():
        raise ReportError(f"{path}: there is no such file; RUN must be the folder of a run")
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: {error}") from error


def _check(where: str, line: dict[str, Any], *names: str) -> None:
    """ReportError unless ``line`` has these names, with values of their kinds."""
    for name in names:
        if name in OF_SOME_STEPS:
            # Runs from before a figure was added do not have it.
            line.setdefault(name, None)
        if name not in line:
            raise ReportError(f"{where}: '{name}' is missing")
        value = line[name]
        null = value is None and name in MAY_BE_NULL
        if name in FLAGS:
            fits, called = isinstance(value, bool), "true or false"
        elif name in WORDS:
            fits, called = isinstance(value, str), "a text"
        else:
            # To Python, true is a number.
            fits, called = type(value) in (int, float), "a number"
        if not (fits or null):
            raise ReportError(f"{where}: '{name}' is {value!r}; it must be {called}")
