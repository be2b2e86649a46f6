"""The routing simulation as a command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--ranks", "2", "--experts", "8", "--top_k", "2", "--tokens", "64", "--tile", "8"]


def simulate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/simulate_routing.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.processes
def test_table_json_and_picture(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "o.json"), "--picture", str(tmp_path / "o.png")]
    done = simulate(*SMALL, "--skew", "0,1", *files)
    assert done.returncode == 0, done.stderr
    assert "P=2 E=8 K=2 T=64 a rank, M=8, skew 1.0: 4.0 tiles an expert" in done.stdout
    facts = json.loads((tmp_path / "o.json").read_text())
    names = [outcome["name"] for outcome in facts["settings"][1]["outcomes"]]
    assert names[0] == "top-k, padded"
    assert {"balance", "nearest", "up", "down", "stochastic"} <= set(names)
    assert (tmp_path / "o.png").stat().st_size > 1000


@pytest.mark.processes
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--experts", "9"], "--experts is 9; --ranks (2) must divide it"),
        (["--top_k", "9"], "--top_k is 9; it must be at most 8"),
        (["--tile", "0"], "--tile is 0; it must be at least 1"),
        (["--rules", "x"], "no rule 'x'; known: none, nearest, balance"),
    ],
)
def test_wrong_arguments(arguments: list[str], words: str) -> None:
    done = simulate(*SMALL, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
