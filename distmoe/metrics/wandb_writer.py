"""Weights & Biases, on rank 0: the one file that imports wandb."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distmoe.config import Config
from distmoe.metrics.record import StepRecord, ValidationRecord
from distmoe.metrics.summary import routing_rows

# In the folder of the run: by what W&B knows it.
ID_FILE = "wandb_run"
LAST_WORDS_S = 5.0


class WandbWriter:
    """The curves of TensorBoard, in the same groups, as a run of the project metrics.wandb.

    ``run``: of W&B, started. Steps that a resume repeats stay as they were sent first.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        # Behind the last one that W&B has; it warns of every line for an earlier one.
        self._first_step: int = run.starting_step
        self._ended = False

    @classmethod
    def open(cls, config: Config, *, resumed_step: int) -> WandbWriter:
        """A resumed run goes on as the same run of W&B; one that begins anew is another one there.
        RuntimeError if W&B does not start."""
        import wandb

        folder = Path(config.run.dir)
        try:
            run: Any = wandb.init(
                project=config.metrics.wandb,
                name=config.run.name,
                dir=str(folder),
                id=_run_id(folder / ID_FILE, resumed_step=resumed_step),
                resume="allow",
                config=asdict(config),
                # Most settings may be others after a resume.
                allow_val_change=True,
                tags=[text for _, text in routing_rows(config)],
            )
        except wandb.Error as error:
            raise RuntimeError(
                f"metrics.wandb is {config.metrics.wandb}, and wandb does not start: {error} "
                "WANDB_MODE=offline needs neither account nor network"
            ) from error
        return cls(run)

    def write(self, record: StepRecord | ValidationRecord) -> None:
        """The scalars of a step or of a validation."""
        if record.step >= self._first_step:
            with _as_os_error():
                self._run.log(record.scalars(), step=record.step)

    def end(self, *, failed: bool) -> None:
        """Send what is left; again is harmless. A failed run does not wait for it for long: its
        other ranks wait for this one."""
        if self._ended:
            return
        self._ended = True
        if failed:
            sending = threading.Thread(target=self._finish, args=(1,), daemon=True)
            sending.start()
            sending.join(LAST_WORDS_S)
        else:
            with _as_os_error():
                self._run.finish(exit_code=0)

    def _finish(self, exit_code: int) -> None:
        # The error of the run is the one to be told.
        with suppress(Exception):
            self._run.finish(exit_code=exit_code)


@contextmanager
def _as_os_error() -> Iterator[None]:
    """What goes wrong in wandb, whose errors have no common base, is an error of a file that cannot
    be written: told once, and no reason to stop training."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _run_id(path: Path, *, resumed_step: int) -> str:
    """What W&B knew the resumed run by; a new one for a run that begins, or had no W&B so far."""
    known = path.read_text().strip() if resumed_step > 0 and path.is_file() else ""
    if not known:
        known = secrets.token_hex(4)
        path.write_text(known + "\n")
    return known
