"""What stands on the screen."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from distmoe.metrics.console import HEADING_EVERY, RunConsole
from distmoe.metrics.record import StepRecord

Make = Callable[..., StepRecord]
Captured = pytest.CaptureFixture[str]

HEADING = (
    "     step     loss        lr     grad  tok/s/rank  slowest    load   tiles"
    "          waste          moved      memory"
)
LINE = (
    "    7/100   2.0000  1.00e-03    0.500          70    1.10x   2.86x   1.50x"
    "   0.0% (30.0%)  35.7% (35.7%)    0.50 GiB"
)


def test_plain_lines_without_a_terminal(capsys: Captured, record: Make) -> None:
    console = RunConsole(enabled=True, steps=100)
    console.table("title", [("a", "x" * 200), ("longer", "y")])
    console.step(record(7))
    console.advance(7)
    console.close()
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert "\r" not in output
    assert "  a       " + "x" * 200 in output.splitlines()
    assert output.splitlines()[-2:] == [HEADING, LINE]


def test_columns_stay_in_place_and_in_120_characters(capsys: Captured, record: Make) -> None:
    console = RunConsole(enabled=True, steps=99999)
    console.step(record(7))
    console.step(
        record(
            99999,
            loss=11.25,
            grad_norm=123.456,
            tokens_per_second_per_rank=1234567.0,
            memory_gib=139.5,
            slowest_over_mean=16.0,
        )
    )
    heading, first, second = capsys.readouterr().out.splitlines()[-3:]
    assert len(heading) == len(first) == len(second) <= 120


def test_a_step_of_forced_routing_is_marked(capsys: Captured, record: Make) -> None:
    console = RunConsole(enabled=True, steps=99999)
    console.step(record(7))
    console.step(record(8, routing="forced"))
    heading, real, forced = capsys.readouterr().out.splitlines()[-3:]
    assert "forced" not in real
    assert forced.split()[heading.split().index("load")] == "forced"
    assert len(forced) == len(heading) <= 120


def test_a_skipped_step_is_marked(capsys: Captured, record: Make) -> None:
    console = RunConsole(enabled=True, steps=100)
    console.step(record(7, skipped=True, grad_norm=float("nan")))
    heading, line = capsys.readouterr().out.splitlines()[-2:]
    assert line.split()[3] == "SKIPPED"
    assert heading.split()[3] == "grad"


def test_names_of_columns_come_again(capsys: Captured, record: Make) -> None:
    console = RunConsole(enabled=True, steps=100)
    for step in range(HEADING_EVERY + 1):
        console.step(record(step))
    assert capsys.readouterr().out.splitlines().count(HEADING) == 2


def test_a_warning_comes_once(capsys: Captured) -> None:
    console = RunConsole(enabled=True, steps=100)
    console.warn_once("a", "careful: 1.5")
    console.warn_once("a", "careful: 1.6")
    console.warn_once("b", "mind")
    assert capsys.readouterr().out == "warning: careful: 1.5\nwarning: mind\n"


def test_brackets_of_a_path_are_no_markup(capsys: Captured) -> None:
    console = RunConsole(enabled=True, steps=100)
    console.line("runs/[bold]x")
    console.table("[red]", [("[a]", "[/b]")])
    assert capsys.readouterr().out == "runs/[bold]x\n[red]\n  [a]  [/b]\n"


def test_other_ranks_print_nothing(capsys: Captured, record: Make) -> None:
    console = RunConsole(enabled=False, steps=100)
    console.step(record(7))
    console.table("title", [("a", "b")])
    console.layers(record(7))
    console.warn_once("a", "careful")
    console.line("line")
    console.close()
    assert capsys.readouterr().out == ""
