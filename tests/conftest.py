"""Without a GPU, Triton and Gluon kernels are interpreted. Set before any kernel is imported."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from slurm_cluster import SlurmCluster, slurm_cluster

# Small matrices by the thousand, and ranks that are threads: more threads would only spin.
torch.set_num_threads(1)
# How long an example takes depends on what else the machine does.
settings.register_profile("any machine", deadline=None, max_examples=50)
settings.load_profile("any machine")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    import gluon_interpreter
    from triton_interpreter import patch_casts

    patch_casts()
    gluon_interpreter.install()


def pytest_collection_finish() -> None:
    """What thousands of tests have imported is a million objects, which no later collection of
    garbage has to look at: some code under test collects often."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """One cluster for all tests that want one."""
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def transformers() -> Any:
    """It looks for a package called kernels, and must not find the repository's folder."""
    with pytest.MonkeyPatch.context() as patch:
        root = Path(__file__).parents[1]
        patch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() != root])
        importlib.import_module("transformers.utils").is_kernels_available()
    return importlib.import_module("transformers")
