"""Whether a run has gone back to the checkpoint that --resume names: its restarts do not."""

from __future__ import annotations

import json
from pathlib import Path

# In the run's folder: what the last start with such an option went back to.
RECORD = "rewound.json"


def record_of(source: Path | None) -> dict[str, str]:
    """What RECORD says of going back to ``source``; None: the beginning."""
    return {"went_back_to": str(source.resolve()) if source else ""}


def went_back(folder: Path, source: Path | None) -> bool:
    """Whether the run in ``folder`` went back to ``source`` (None: the beginning) before, and that
    is still what it goes on from."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return False
    return bool(record == record_of(source))
