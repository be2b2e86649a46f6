"""The one command for a GPU machine, on a machine without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def check_gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, PYTHON=sys.executable)
    return subprocess.run(
        ["tools/check_gpu.sh", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.processes
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = check_gpu(str(tmp_path))
    assert done.returncode == 2
    assert "there is no GPU that torch can use" in done.stderr


@pytest.mark.processes
def test_wrong_option() -> None:
    done = check_gpu("--fast")
    assert done.returncode == 2
    assert "unknown option --fast; see --help" in done.stderr
