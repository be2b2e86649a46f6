"""`distmoe train` on two ranks, with a fault in one of them.

python tools/faulty_run.py FAULT train CONFIG [options]
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from distmoe.launch.cli import RESUMES, main
from distmoe.launch.env import hide_torch_warnings
from distmoe.launch.local import run_local

NAN = float("nan")

# The step of the fault, and the rank, by its variable.
STEP, RANK = 5, "1"


def nan_gradient(trainer: Any) -> None:
    def spoil(module: Any, inputs: Any, outputs: Any) -> Any:
        hook.remove()
        return (inputs[0] * NAN,)

    hook = trainer.engine.model.final_norm.register_full_backward_hook(spoil)


def nan_batch(trainer: Any) -> None:
    def spoil(module: Any, inputs: Any, embedded: Any) -> Any:
        hook.remove()
        return embedded * NAN

    hook = trainer.engine.model.embedding.register_forward_hook(spoil)


def nan_router(trainer: Any) -> None:
    """It stays in the weights, so that no later step can go well."""
    router = trainer.engine.model.moe_layers()[0].router_EH
    (router.to_local() if hasattr(router, "to_local") else router).data.mul_(NAN)


def endless_loop(trainer: Any) -> None:
    while True:
        time.sleep(0.01)


def out_of_memory(trainer: Any) -> None:
    import torch

    torch.empty(1 << 46, dtype=torch.float32)


def error_in_the_code(trainer: Any) -> None:
    raise AttributeError("'NoneType' object has no attribute 'shape'")


def another_version() -> None:
    import distmoe

    distmoe.__version__ = "0.0.9"


def no_mpi4py() -> None:
    sys.modules["mpi4py"] = None  # type: ignore[assignment]


def too_few_devices() -> None:
    """A machine that has one GPU, as torch sees it."""
    import torch

    torch.cuda.is_available = lambda: True  # type: ignore[assignment]
    torch.cuda.device_count = lambda: 1


AT_STEP = {
    "nan-gradient": nan_gradient,
    "nan-batch": nan_batch,
    "nan-router": nan_router,
    "endless-loop": endless_loop,
    "out-of-memory": out_of_memory,
    "error-in-the-code": error_in_the_code,
}
BEFORE = {"another-version": another_version}
BEFORE_ON_ALL = {"no-mpi4py": no_mpi4py, "too-few-devices": too_few_devices}


def _at_step(act: Callable[[Any], None]) -> None:
    from distmoe.train.trainer import Trainer

    step = Trainer._step

    def faulty(trainer: Trainer) -> None:
        if trainer.done + 1 == STEP:
            act(trainer)
        step(trainer)

    Trainer._step = faulty  # type: ignore[method-assign]


def _main() -> int:
    name, *argv = sys.argv[1:]
    if "RANK" not in os.environ:
        command = [sys.executable, os.path.abspath(__file__), name, *argv]
        return run_local(command, 2, threads=1, advice=RESUMES)
    # A fault imports torch before the run does.
    hide_torch_warnings()
    if name in BEFORE_ON_ALL:
        BEFORE_ON_ALL[name]()
    elif os.environ["RANK"] == RANK and name in BEFORE:
        BEFORE[name]()
    elif os.environ["RANK"] == RANK:
        _at_step(AT_STEP[name])
    return main(argv)


if __name__ == "__main__":
    sys.exit(_main())
