"""The comparison of training runs as a command: what it refuses, and a run that fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import compare_training
import pytest
from links import slow_link
from wrong_arguments import refusal

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/quickstart.toml")


def compare(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/compare_training.py"), *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["no.toml"], "config is no.toml; there is no such file"),
        ([CONFIG, "--ranks", "3"], "--ranks is 3; two hosts need an even number"),
        ([CONFIG, "--steps", "6"], "--steps is 6; it must be above --warm-up (6)"),
    ],
)
def test_wrong_options(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refusal(compare_training.main, options, capsys)


def test_a_run_that_fails_is_a_failure_with_its_own_words() -> None:
    with slow_link(0):
        pass
    done = compare(CONFIG, "--", "--moe.top_k", "99")
    assert done.returncode == 1
    assert "moe.top_k is 99" in done.stderr
