"""Start the ranks of the DeepSpeed tests, once for all cases."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from typing import Any

from warm_python import start_python

RANKS = 4
PROGRAM = str(Path(__file__).with_name("deepspeed_ranks.py"))


class Results:
    """What the ranks of every case have returned."""

    def __init__(self, folder: Path, cases: list[dict[str, Any]]) -> None:
        self.folder = folder
        self._worlds = {case["name"]: case["world"] for case in cases}

    def of(self, name: str) -> list[dict[str, Any]]:
        """One result per rank."""
        return [
            pickle.loads((self.folder / f"{name}-{rank}.pkl").read_bytes())
            for rank in range(self._worlds[name])
        ]


def run_all(cases: list[dict[str, Any]], folder: Path, *, timeout_s: float) -> Results:
    """Every case, in order. AssertionError with the output of a rank that failed."""
    (folder / "cases.json").write_text(json.dumps(cases))
    ranks = [
        start_python(PROGRAM, str(folder), str(rank), LOCAL_RANK="0", OMP_NUM_THREADS="1")
        for rank in range(RANKS)
    ]
    deadline = time.monotonic() + timeout_s
    try:
        while any(rank.poll() is None for rank in ranks):
            late = time.monotonic() > deadline
            if late or any(rank.poll() for rank in ranks):
                failed = next((r for r, rank in enumerate(ranks) if rank.poll()), 0)
                raise AssertionError(
                    f"rank {failed} {'is late' if late else 'failed'}:\n{ranks[failed].said()}"
                )
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return Results(folder, cases)
