"""The tutorial's commands in an empty folder, in order: every one of them, with fewer steps on one
rank in this process. `tools/run_tutorial.py` runs them as they stand."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import checks
import pytest
import torch
from pages import ROOT, Word, blocks
from shell import lines, split

from distmoe.launch.cli import main as distmoe_main

# A run of one rank takes no time to start. The first run is stopped by its length, not by a signal.
ONE_RANK = ("--launch.nproc", "1", "--parallel.ep", "1", "--train.global_batch_size", "4")
SHORT = ("--optim.warmup_steps", "1", "--train.validation_batches", "1")
STEPS = {"timeout": "2", "runs/traced": "12"}
OTHERS = ("cat", "wc", "tail", "ls")


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What a run changes in its process is put back."""
    monkeypatch.chdir(tmp_path)
    interrupt, threads = signal.getsignal(signal.SIGINT), torch.get_num_threads()
    with mock.patch.dict(os.environ):
        yield tmp_path
    signal.signal(signal.SIGINT, interrupt)
    torch.set_num_threads(threads)


def typed() -> Iterator[Word]:
    """The commands of the page."""
    for block in blocks(ROOT / "docs/tutorial.md", "sh"):
        yield from lines(block)


def distmoe(words: list[str], text: str) -> str:
    """What `distmoe WORDS` prints; a wrong setting that the page expects is refused."""
    if words[0] == "train":
        steps = next((STEPS[sign] for sign in STEPS if sign in text), "4")
        words = [*words, *ONE_RANK, *SHORT, "--train.steps", steps]
    if words[0] == "doctor":
        words = [*words, "--nproc", "1"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = distmoe_main(words)
    assert code == 0 or "exit code" in text, f"{text}: {output.getvalue()}"
    return output.getvalue()


def python(script: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(Path(script).read_text(), script, "exec"), {"__name__": "__main__"})
    return output.getvalue()


def other(text: str) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shell = ["bash", "-e", "-u", "-o", "pipefail", "-c", text]
    done = subprocess.run(shell, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{text}: {done.stderr}"
    return done.stdout


@pytest.mark.usefixtures("transformers")
def test_all_commands_in_order(empty_folder: Path) -> None:
    said = {}
    for line in typed():
        text, words = line.text, list(next(split(line)).words)
        if words[0] == "timeout":
            words = words[words.index("distmoe") :]
        if words[0] == "pip":
            checks.pip(words[1:])
        elif words[0] == "distmoe":
            said[text] = distmoe(words[1:], text)
        elif words[0] == "python":
            said[text] = python(words[1])
        else:
            assert words[0] in OTHERS, f"no class for {text}"
            said[text] = other(text)
    everything = "\n".join(said.values())
    for words in (
        "moe.top_k is 20; it must be in 1..moe.num_experts (16)",
        "resumed from runs/tutorial/checkpoints/step-00000002",
        "steps-10-12-rank-0.json",
        "Qwen3MoeForCausalLM",
        "#SBATCH --nodes=2",
        "torchrun",
        "parallel.profile",
    ):
        assert words in everything, words
    assert (empty_folder / "compare.html").stat().st_size > 10_000
