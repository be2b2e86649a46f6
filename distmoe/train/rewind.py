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

# In the run's folder: what the last start with such an option went back to.
RECORD = "rewound.json"
ABANDONED = "abandoned-"
HISTORY = ("metrics.jsonl", "validation.jsonl", "expert_load.jsonl", "starts.jsonl")


def went_back(folder: Path, source: Path | None) -> bool:
    """Whether the run in ``folder`` went back to ``source`` (None: the beginning) before, and that
    is still what it goes on from."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return False
    return bool(record == _record(source))


def left_behind(complete: Sequence[Path], source: Path | None) -> list[Path]:
    """Checkpoints of a run that do not lead to ``source``: all of them, if it is of another run."""
    if source is None or source.resolve() not in [path.resolve() for path in complete]:
        return list(complete)
    return [path for path in complete if step_of(path) > step_of(source)]


def go_back(folder: Path, complete: Sequence[Path], source: Path | None) -> list[str]:
    """Move what is left behind aside, and write down that it was done; a line for the user.

    A kill in between loses nothing: the next start moves the rest.
    """
    lines = []
    history = [folder / name for name in HISTORY if (folder / name).exists()]
    leaving = left_behind(complete, source)
    if history or leaving:
        aside = _new_folder(folder)
        # Copied: lines up to the step that the run goes back to stay where they are.
        for file in history:
            shutil.copy2(file, aside)
        for path in leaving:
            path.rename(aside / path.name)
        steps = [step_of(path) for path in leaving]
        named = f"checkpoints of steps {', '.join(map(str, steps))}, and " if steps else ""
        lines.append(f"set aside in {aside}: {named}the metrics so far")
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{RECORD}.part"
    beside.write_text(json.dumps(_record(source)) + "\n")
    beside.replace(folder / RECORD)
    return lines


def forget(folder: Path) -> None:
    """Whatever is asked for next is a new wish."""
    (folder / RECORD).unlink(missing_ok=True)


def _record(source: Path | None) -> dict[str, str]:
    return {"went_back_to": str(source.resolve()) if source else ""}


def _new_folder(folder: Path) -> Path:
    number = 1 + sum(1 for _ in folder.glob(f"{ABANDONED}*"))
    aside = folder / f"{ABANDONED}{number}"
    aside.mkdir()
    return aside
