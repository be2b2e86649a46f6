"""Programs in the documentation run as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pages import PAGES, ROOT, Block, blocks, name
from shell import commands
from warm_python import run_python

from distmoe.launch.ports import free_port

EXAMPLES = [block for page in PAGES for block in blocks(page, "python")]


@pytest.fixture
def one_rank(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the only rank of torchrun, in the folder where commands are typed."""
    monkeypatch.chdir(workshop)
    port = free_port()
    for variable, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}.items():
        monkeypatch.setenv(variable, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("block", EXAMPLES, ids=lambda block: f"{name(block.page)}:{block.line}")
def test_example_runs(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.random.get_rng_state()
    exec(compile(block.text, f"{name(block.page)}:{block.line}", "exec"), {"__name__": "__main__"})
    torch.random.set_rng_state(state)
    assert ("print(" in block.text) == bool(capsys.readouterr().out)


@pytest.mark.processes
def test_layer_on_two_ranks(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop)
    (command,) = commands(blocks(ROOT / "docs/layer.md", "sh")[0])
    program, *arguments = command.words
    assert program == "torchrun"
    done = run_python("-m", "torch.distributed.run", *arguments)
    assert done.returncode == 0, done.stderr
    shape, _, counts = done.stdout.partition(" [")
    assert shape == "torch.Size([8, 128, 256])"
    assert all(int(count) % 128 == 0 for count in counts.strip("]\n").split(","))
