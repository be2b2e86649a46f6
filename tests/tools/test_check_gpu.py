"""The one command for a GPU machine, on a machine without one."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import bench_moe
import pytest
import torch

from distmoe.config import check, load_config

ROOT = Path(__file__).parents[2]
# Answers for two GPUs, and fails where memory is measured.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *get_device_name*) echo A-GPU ;;
    *device_count*) echo 2 ;;
    *measure_memory*) echo "no memory" >&2; exit 3 ;;
    *) echo "ran ${*@Q}" ;;
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


@dataclass(frozen=True)
class Dry:
    """A run of all parts by a Python that says what it was asked to do."""

    code: int
    out: Path
    stdout: str

    def commands(self, *begin: str) -> list[list[str]]:
        """What follows ``begin`` in the commands that begin so."""
        lines = "\n".join(path.read_text() for path in (self.out / "logs").iterdir())
        words = [shlex.split(line)[1:] for line in lines.splitlines() if line.startswith("ran ")]
        return [own[len(begin) :] for own in words if own[: len(begin)] == list(begin)]


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Dry:
    folder = tmp_path_factory.mktemp("dry")
    python, out = folder / "python", folder / "out"
    python.write_text(PYTHON)
    python.chmod(0o755)
    done = check_gpu(str(out), python=str(python))
    return Dry(done.returncode, out, done.stdout)


def test_a_part_that_fails_stops_no_other(dry: Dry) -> None:
    assert dry.code == 1
    parts = "doctor tests compile quick train settings ranks rounding bench tune memory peers gluon"
    ended = dict.fromkeys(parts.split(), "well") | {"memory": "ended with 3"}
    summary = re.sub(r"\d+ s", "N s", dry.stdout.partition("== summary: ")[2])
    assert summary.splitlines() == [
        f"A-GPU, {dry.out}",
        *(f"{part}: {how}, N s" for part, how in ended.items()),
    ]
    assert (dry.out / "logs/memory.log").read_text() == "no memory\n"
    assert (dry.out / "logs/doctor.log").read_text() == "ran '-m' 'distmoe' 'doctor'\n"


def test_the_files_that_it_names_are_there(dry: Dry) -> None:
    words = {word for command in dry.commands() for word in command}
    named = {word for word in words if re.match(r"(tests|tools|configs)/", word)}
    assert {"tests/kernels", "tools/bench_moe.py", "configs/check_gpu.toml"} <= named
    assert [word for word in named if not (ROOT / word).exists()] == []


def test_its_runs_are_valid(dry: Dry) -> None:
    runs = dry.commands("-m", "distmoe", "train")
    names = [options[options.index("--run.name") + 1] for _, *options in runs]
    assert len(names) == len(set(names)) > 8
    assert {"--parallel.cp", "fp8"} <= {word for _, *options in runs for word in options}
    for file, *options in runs:
        if "--resume" in options:
            at = options.index("--resume")
            options[at : at + 2] = []
        world = 2 if "--launch.nproc" in options else 1
        check(load_config(ROOT / file, options), world, with_data=False)


def test_its_benches_are_valid(dry: Dry) -> None:
    benches = dry.commands("tools/bench_moe.py")
    assert len(benches) > 5
    for options in benches:
        request = bench_moe._request(bench_moe._parser().parse_args(options))
        assert request.shapes
