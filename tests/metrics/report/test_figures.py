"""Figures of a report against the files, added up here in another way."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distmoe.metrics.report.cli import main
from distmoe.metrics.tally import MEDIANS

MakeRun = Callable[..., Path]


def lines_of(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def column(lines: list[dict[str, float]], name: str) -> np.ndarray:
    return np.array([np.nan if line[name] is None else line[name] for line in lines], dtype=float)


def test_figures_are_those_of_the_files(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("run")
    assert main([str(folder), "--json", str(tmp_path / "report.json")]) == 0
    (run,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    figures = run["figures"]
    lines = lines_of(folder / "metrics.jsonl")
    steps = column(lines, "step")
    # Of two starts, before steps 1 and 5, the first three steps each are left out.
    measured = np.isin(steps, [4, 8])
    assert figures["measured_steps"] == 2
    for name in MEDIANS:
        values = column(lines, name)[measured]
        expected = None if np.isnan(values).all() else pytest.approx(np.median(values))
        assert figures[name] == expected, name
    speed = column(lines, "tokens_per_second_per_rank")
    assert figures["warm_up_tokens_per_second_per_rank"] == np.median(speed[~measured])
    assert figures["tokens_per_second"] == pytest.approx(2 * np.median(speed[measured]))
    assert figures["tokens_per_day"] == pytest.approx(2 * np.median(speed[measured]) * 24 * 3600)
    # Step 4 was skipped.
    assert (figures["trained_tokens"], figures["skipped_steps"]) == (7 * 14, 1)
    assert figures["memory_gib"] == column(lines, "memory_gib").max()
    total = {name: column(lines, f"{name}_seconds").sum() for name in PARTS_OF_A_STEP}
    assert figures["compute_seconds"] == pytest.approx(total["forward_backward"] - total["exposed"])
    rest = total["step"] - total["data"] - total["forward_backward"] - total["optimizer"]
    assert figures["rest_seconds"] == pytest.approx(rest)
    saved = column(lines, "checkpoint_seconds").sum() + 2 * 0.4
    assert figures["checkpoint_seconds"] == pytest.approx(saved)
    validated = column(lines_of(folder / "validation.jsonl"), "seconds").sum()
    assert figures["validation_seconds"] == pytest.approx(validated) == pytest.approx(0.3 * 12)
    whole = total["step"] + saved + validated
    assert figures["tokens_per_day_in_all"] == pytest.approx(7 * 14 * 24 * 3600 / whole)
    assert (figures["loss"], figures["validation_loss"]) == (0.0, 3.2)
    assert (figures["state"], figures["starts"], figures["ranks"]) == ("done", 2, 2)
    assert figures["mfu"] is None


PARTS_OF_A_STEP = ("step", "data", "forward_backward", "optimizer", "exposed")


def test_every_form_has_the_same_figures(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(make_run("one")), str(make_run("other", top_k=3))]
    capsys.readouterr()
    files = {kind: tmp_path / f"report.{kind}" for kind in ("json", "csv", "markdown", "html")}
    options = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    assert main([*runs, *options]) == 0
    report = json.loads(files["json"].read_text())
    assert report["differing"] == {"moe.top_k": [2, 3]}
    with files["csv"].open() as file:
        rows = list(csv.DictReader(file))
    for row, of_run in zip(rows, report["runs"], strict=True):
        assert row.pop("run") == of_run["run"]
        shown = {name: "" if v is None else str(v) for name, v in of_run["figures"].items()}
        assert row == shown
    terminal, markdown = capsys.readouterr().out, files["markdown"].read_text()
    page = files["html"].read_text()
    # 70 (1 + s / 10) tokens/s/rank in steps 4 and 8.
    for text in (terminal, markdown, page):
        assert "moe.top_k" in text
        assert text.count("112") >= 2
    assert markdown.splitlines()[2] == "| moe.top_k | 2 | 3 |"
    assert "| tokens/s/rank | 112 | 112 |" in markdown.splitlines()
    for title in ("Loss", "Throughput", "Time", "Exposed communication"):
        assert f"<h2>{title}</h2><svg" in page
    assert page.count("<h2>Expert load of ") == 2
    assert page.index("moe.top_k") < page.index("<svg")
    assert "<td>train.steps</td><td>100</td><td>100</td>" in page
    # One page: nothing is loaded, no program runs.
    links = page.replace('xmlns="http://', "").replace('xmlns:xlink="http://', "")
    assert "<script" not in page
    assert 'src="' not in page.replace('src="data:', "")
    assert 'href="http' not in links
    assert "@import" not in page
