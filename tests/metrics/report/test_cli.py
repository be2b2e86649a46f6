"""What a report says of runs that are broken, or not yet done."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from distmoe.config import Config
from distmoe.launch.cli import main as distmoe
from distmoe.metrics.report.cli import main
from distmoe.metrics.reporter import Reporter

MakeRun = Callable[..., Path]
Captured = pytest.CaptureFixture[str]


def put(path: Path, number: int, line: str) -> None:
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("".join(f"{line}\n" for line in lines))


def changed(path: Path, number: int, **values: object) -> str:
    line = json.loads(path.read_text().splitlines()[number - 1])
    return json.dumps({**line, **values})


BROKEN = {
    "no JSON": ("metrics.jsonl", 3, "{oops", "line 3: no JSON: "),
    "no object": ("metrics.jsonl", 2, "[1]", "line 2: it must be an object, and is [1]"),
    "missing": ("metrics.jsonl", 1, '{"step": 1}', "line 1: 'loss' is missing"),
    "no number": ("metrics.jsonl", 4, {"tokens": "9"}, "line 4: 'tokens' is '9'; it must be a"),
    "null": ("metrics.jsonl", 4, {"tokens": None}, "line 4: 'tokens' is None; it must be a number"),
    "true": ("metrics.jsonl", 4, {"tokens": True}, "line 4: 'tokens' is True; it must be a number"),
    "no flag": ("metrics.jsonl", 4, {"warm_up": 1}, "line 4: 'warm_up' is 1; it must be true or"),
    "order": ("metrics.jsonl", 5, {"step": 4}, "line 5: 'step' is 4; it must be above 4"),
    "validation": ("validation.jsonl", 2, '{"step": 8}', "line 2: 'validation_loss' is missing"),
    "event": ("starts.jsonl", 2, {"event": "x"}, "line 2: 'event' is 'x'; it must be start or end"),
    "load": ("expert_load.jsonl", 1, {"pairs": 3}, "line 1: 'pairs' is 3; it must be an object"),
    "config": ("config.toml", 2, "name = ", "(at line 2, column 8)"),
}


@pytest.mark.parametrize(("file", "number", "line", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_with_its_line(
    make_run: MakeRun,
    capsys: Captured,
    file: str,
    number: int,
    line: str | dict[str, object],
    message: str,
) -> None:
    path = make_run("run") / file
    put(path, number, line if isinstance(line, str) else changed(path, number, **line))
    assert distmoe(["report", str(path.parent)]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert str(path) in error
    assert message in error


def test_a_slowest_rank_that_nobody_timed_is_a_dash(make_run: MakeRun, capsys: Captured) -> None:
    folder = make_run("run")
    file = folder / "metrics.jsonl"
    unknown = {"slowest_over_mean": None, "slowest_rank": None}
    lines = [json.loads(line) | unknown for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    capsys.readouterr()
    assert main([str(folder)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "slowest " in line]
    assert [row[-2] for row in rows] == ["-", "-"]


def test_a_run_from_before_energy_was_noted_is_read(make_run: MakeRun, capsys: Captured) -> None:
    folder = make_run("old")
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        del line["energy_joules"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main([str(folder)]) == 0
    assert "old" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["config.toml", "metrics.jsonl", "starts.jsonl"])
def test_a_missing_file_is_named(make_run: MakeRun, capsys: Captured, file: str) -> None:
    folder = make_run("run")
    (folder / file).unlink()
    assert main([str(folder)]) == 1
    assert f"{folder / file}: there is no such file" in capsys.readouterr().err


def test_wrong_arguments(tmp_path: Path, capsys: Captured) -> None:
    assert main([]) == 2
    assert main(["run", "--watch", "0"]) == 2
    assert main(["run", "--html", str(tmp_path / "none" / "x.html")]) == 2
    assert main(["run", "--csv", str(tmp_path)]) == 2
    assert main([str(tmp_path / "none")]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert "RUN" in errors[0]
    assert "'0' must be a number above 0" in errors[1]
    assert f"there is no folder '{tmp_path / 'none'}'" in errors[2]
    assert "is a folder; it must be a file" in errors[3]
    assert errors[4].endswith("none: there is no such folder")


def test_a_line_that_is_being_written_is_left_out(make_run: MakeRun, capsys: Captured) -> None:
    folder = make_run("run", ended=False)
    capsys.readouterr()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    assert main([str(folder)]) == 0
    output = capsys.readouterr().out
    assert "running or killed; last step 0 s ago" in output
    (steps,) = [line for line in output.splitlines() if " steps  " in line]
    assert " 8 " in steps


def test_a_run_that_failed_says_so(make_run: MakeRun, config: Config, capsys: Captured) -> None:
    folder = make_run("run")
    own = replace(config, run=replace(config.run, dir=str(folder)))
    # What a trainer does on its way out, whatever has happened.
    Reporter.open(own, rank=0, world=2, resumed_step=8).close()
    capsys.readouterr()
    assert main([str(folder), "--watch"]) == 0
    assert "stopped by an error" in capsys.readouterr().out


def test_watching_ends_with_the_run(make_run: MakeRun, capsys: Captured) -> None:
    """The run is resumed, makes its ninth step while it is watched, and ends."""
    folder = make_run("run", ended=False)
    capsys.readouterr()
    step = changed(folder / "metrics.jsonl", 8, step=9)
    end = {"event": "end", "step": 9, "time": 1e12, "stopped": "", "checkpoint_seconds": 0.1}

    def finish() -> None:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(step + "\n")
        with (folder / "starts.jsonl").open("a") as file:
            file.write(json.dumps(end) + "\n")

    timer = threading.Timer(0.3, finish)
    timer.start()
    assert main([str(folder), "--watch", "0.05"]) == 0
    timer.join()
    states = [line for line in capsys.readouterr().out.splitlines() if " state " in line]
    assert len(states) > 1
    assert "running" in states[0]
    assert "done" in states[-1]


def test_a_run_without_a_step_is_waited_for(make_run: MakeRun, capsys: Captured) -> None:
    folder = make_run("run")
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("")
    capsys.readouterr()
    assert main([str(folder)]) == 1
    assert "metrics.jsonl has no step yet" in capsys.readouterr().err
    timer = threading.Timer(0.2, (folder / "metrics.jsonl").write_text, [lines])
    timer.start()
    assert main([str(folder), "--watch", "0.05"]) == 0
    timer.join()
    assert "has no step yet" in capsys.readouterr().out
