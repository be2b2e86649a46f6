"""Going back to an older checkpoint, or to the beginning, in a folder that has gone further.

The option that asks for it is still there when the same command starts again, after a requeue or a
restart of its ranks; so what it asks for is done once and written down, and what was learned since
then counts from there on. What the run leaves behind is moved aside, and never deleted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from distmoe.checkpoint.store import step_of
from distmoe.config.rewound import RECORD, record_of

ABANDONED = "abandoned-"
HISTORY = ("metrics.jsonl", "validation.jsonl", "expert_load.jsonl", "starts.jsonl")
# By its name Weights & Biases would go on with what was left behind.
WANDB_RUN = "wandb_run"


def left_behind(complete: Sequence[Path], source: Path | None) -> list[Path]:
    """Of a run's checkpoints, oldest first, those that do not lead to ``source``: all of them, if
    that is of another run."""
    if source is None or not _is_own(complete, source):
        return list(complete)
    return [path for path in complete if step_of(path) > step_of(source)]


def go_back(folder: Path, complete: Sequence[Path], source: Path | None) -> list[str]:
    """Move what is left behind aside, and write down that it was done; a line for the user.

    A kill in between loses nothing: the next start moves the rest.
    """
    lines = []
    history = [folder / name for name in HISTORY if (folder / name).exists()]
    leaving = left_behind(complete, source)
    in_itself = source is not None and _is_own(complete, source)
    if history or leaving:
        aside = _new_folder(folder)
        for file in history:
            shutil.copy2(file, aside)
            # Up to the step that a run goes back to in itself its lines stay where they are.
            if not in_itself:
                file.unlink()
        for path in leaving:
            path.rename(aside / path.name)
        if (folder / WANDB_RUN).exists():
            (folder / WANDB_RUN).rename(aside / WANDB_RUN)
        steps = [step_of(path) for path in leaving]
        named = f"checkpoints of steps {', '.join(map(str, steps))}, and " if steps else ""
        lines.append(f"set aside in {aside}: {named}the metrics so far")
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{RECORD}.part"
    beside.write_text(json.dumps(record_of(source)) + "\n")
    beside.replace(folder / RECORD)
    return lines


def forget(folder: Path) -> None:
    """Whatever is asked for next is a new wish."""
    (folder / RECORD).unlink(missing_ok=True)


def _is_own(complete: Sequence[Path], source: Path) -> bool:
    """Whether ``source`` is, or was until it made room, one of the run's checkpoints."""
    return any(path.resolve().parent == source.resolve().parent for path in complete)


def _new_folder(folder: Path) -> Path:
    numbers = [path.name.removeprefix(ABANDONED) for path in folder.glob(f"{ABANDONED}*")]
    number = 1 + max((int(text) for text in numbers if text.isdecimal()), default=0)
    aside = folder / f"{ABANDONED}{number}"
    aside.mkdir()
    return aside
