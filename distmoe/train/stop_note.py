"""The file STOPPED of a run's folder: a signal ended the run early, and its last state is saved.

torchrun ends with 1 whatever its workers ended with, so job scripts look for this file.
"""

from __future__ import annotations

from pathlib import Path

NAME = "STOPPED"


def write_stop_note(folder: Path, done: int, steps: int) -> None:
    """Say that ``done`` of ``steps`` steps are in a complete checkpoint, and the rest is to do."""
    (folder / NAME).write_text(f"step {done} of {steps}\n")


def remove_stop_note(folder: Path) -> None:
    """The run goes on."""
    (folder / NAME).unlink(missing_ok=True)
