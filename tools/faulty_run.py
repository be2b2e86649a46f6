"""`distmoe train` on two ranks, with a fault in one of them.

python tools/faulty_run.py FAULT CONFIG [options]
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
FAULTS: dict[str, Callable[[], None]] = {}

# The step of the fault, and the rank, by its variable.
STEP, RANK = 5, "1"


def _fault(install: Callable[[], None]) -> Callable[[], None]:
    """Called by rank 1 before it begins, or by all ranks if the name says so."""
    FAULTS[install.__name__.replace("_", "-")] = install
    return install


def _before_step(act: Callable[[Any, int], Any]) -> None:
    """``act(trainer, step)`` before every step."""
    from distmoe.train.trainer import Trainer

    step = Trainer._step

    def faulty(trainer: Trainer) -> None:
        act(trainer, trainer.done + 1)
        step(trainer)

    Trainer._step = faulty  # type: ignore[method-assign]


@_fault
def nan_gradient() -> None:
    def act(trainer: Any, step: int) -> None:
        if step == STEP:
            spoil = trainer.engine.model.final_norm.register_full_backward_hook(
                lambda module, inputs, outputs: (inputs[0] * NAN,)
            )
        elif step == STEP + 1:
            trainer.spoil.remove()
            return
        else:
            return
        trainer.spoil = spoil

    _before_step(act)


@_fault
def nan_batch() -> None:
    def act(trainer: Any, step: int) -> None:
        def spoil(module: Any, inputs: Any, embedded: Any) -> Any:
            return embedded * (NAN if trainer.done + 1 == STEP else 1.0)

        if step == 1:
            trainer.engine.model.embedding.register_forward_hook(spoil)

    _before_step(act)


@_fault
def nan_router() -> None:
    """It stays in the weights, so that no later step can go well."""

    def act(trainer: Any, step: int) -> None:
        if step == STEP:
            router = trainer.engine.model.moe_layers()[0].router_EH
            (router.to_local() if hasattr(router, "to_local") else router).data.mul_(NAN)

    _before_step(act)


@_fault
def endless_loop() -> None:
    def act(trainer: Any, step: int) -> None:
        while step == STEP:
            time.sleep(0.01)

    _before_step(act)


@_fault
def out_of_memory() -> None:
    def act(trainer: Any, step: int) -> None:
        import torch

        if step == STEP:
            torch.empty(1 << 46, dtype=torch.float32)

    _before_step(act)


@_fault
def error_in_the_code() -> None:
    def act(trainer: Any, step: int) -> None:
        if step == STEP:
            raise AttributeError("'NoneType' object has no attribute 'shape'")

    _before_step(act)


@_fault
def too_few_devices() -> None:
    """A machine that has one GPU, as torch sees it."""
    import torch

    torch.cuda.is_available = lambda: True  # type: ignore[assignment]
    torch.cuda.device_count = lambda: 1


@_fault
def another_version() -> None:
    import distmoe

    distmoe.__version__ = "0.0.9"


@_fault
def no_mpi4py() -> None:
    sys.modules["mpi4py"] = None  # type: ignore[assignment]


def _main() -> int:
    name, *argv = sys.argv[1:]
    if "RANK" not in os.environ:
        command = [sys.executable, os.path.abspath(__file__), name, "train", *argv]
        return run_local(command, 2, threads=1, advice=RESUMES)
    # A fault imports torch before the run does.
    hide_torch_warnings()
    if os.environ["RANK"] == RANK or name in ("no-mpi4py", "too-few-devices"):
        FAULTS[name]()
    return main(argv)


if __name__ == "__main__":
    sys.exit(_main())
