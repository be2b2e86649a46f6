"""The one command for a GPU machine, on a machine without one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
# Answers for a GPU, and fails where memory is measured.
PYTHON = """#!/bin/sh
case "$*" in
    *get_device_name*) echo A-GPU ;;
    *measure_memory*) echo "no memory" >&2; exit 3 ;;
    *) echo "ran $*" ;;
esac
"""

pytestmark = pytest.mark.processes


def check_gpu(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, PYTHON=python)
    return subprocess.run(
        ["tools/check_gpu.sh", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = check_gpu(str(tmp_path))
    assert done.returncode == 2
    assert "there is no GPU that torch can use" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fast"], "unknown option --fast"),
        (["--only", "quick,slow"], "unknown part slow; known: doctor tests compile"),
        (["--only"], "--only needs parts"),
        (["--minutes", "soon"], "--minutes is soon; it must be a whole number from 1"),
        (["here", "there"], "one folder only"),
    ],
)
def test_wrong_arguments(arguments: list[str], words: str) -> None:
    done = check_gpu(*arguments)
    assert done.returncode == 2
    assert f"{words}" in done.stderr
    assert "see --help" in done.stderr


def test_a_part_that_fails_stops_no_other(tmp_path: Path) -> None:
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(PYTHON)
    python.chmod(0o755)
    done = check_gpu("--only", "memory,peers,doctor", str(out), python=str(python))
    assert done.returncode == 1, done.stderr
    summary = re.sub(r"\d+ s", "N s", done.stdout.partition("== summary: ")[2])
    assert summary.splitlines() == [
        f"A-GPU, {out}",
        "doctor: well, N s",
        "memory: ended with 3, N s",
        "peers: well, N s",
    ]
    logs = {path.name: path.read_text() for path in (out / "logs").iterdir()}
    assert logs["memory.log"] == "no memory\n"
    assert logs["doctor.log"] == "ran -m distmoe doctor\n"
    assert f"--backends bound,triton,liger --json {out}/A-GPU-liger.json" in logs["peers.log"]
