"""Weights & Biases, on rank 0: the one file that imports wandb."""

from __future__ import annotations

import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distmoe.config import Config
from distmoe.metrics.record import StepRecord
from distmoe.metrics.summary import routing_rows

# In the folder of the run: by what W&B knows it.
ID_FILE = "wandb_run"


class WandbWriter:
    """The curves of TensorBoard, in the same groups, as a run of the project metrics.wandb.

    A resumed run goes on as the same run of W&B; one that begins anew is another one there. Steps
    that a resume repeats stay as they were sent first. RuntimeError if W&B does not start.
    """

    def __init__(self, config: Config, *, resumed_step: int) -> None:
        import wandb

        folder = Path(config.run.dir)
        try:
            self._run: Any = wandb.init(
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
        # Behind the last one that W&B has; it warns of every line for an earlier one.
        self._first_step: int = self._run.starting_step
        self._ended = False

    def write(self, record: StepRecord) -> None:
        """The scalars of a step."""
        self._log(record.scalars(), record.step)

    def validation(self, step: int, loss: float) -> None:
        self._log({"validation/loss": loss}, step)

    def _log(self, values: dict[str, float], step: int) -> None:
        if step >= self._first_step:
            self._run.log(values, step=step)

    def end(self, *, failed: bool) -> None:
        """Send what is left; again is harmless."""
        if not self._ended:
            self._ended = True
            self._run.finish(exit_code=int(failed))


def _run_id(path: Path, *, resumed_step: int) -> str:
    """What W&B knew the resumed run by; a new one for a run that begins, or had no W&B so far."""
    known = path.read_text().strip() if resumed_step > 0 and path.is_file() else ""
    if not known:
        known = secrets.token_hex(4)
        path.write_text(known + "\n")
    return known
