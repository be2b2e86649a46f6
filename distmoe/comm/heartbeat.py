"""How far every rank of the run has come, through the store of the process group.

A rank writes now and then how many transfers it has begun. All ranks begin the same transfers, so
one whose number is lower keeps the others waiting, and one that has stopped to write is not there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

from torch._C._distributed_c10d import Store

ANSWER_S = 3.0


class Standing(NamedTuple):
    """``laggards``: the ranks that keep this one waiting, in words, "" if none. ``is_waited_for``:
    another rank has begun a transfer that this one has not."""

    laggards: str
    is_waited_for: bool


class Heartbeats:
    """Of ``world`` ranks, ``rank`` being this one, whose own are written every ``beat_s`` seconds
    by a thread, from ``open`` to ``close``.

    Two connections to one store: a reader that gets no answer must block nobody.
    """

    def __init__(
        self, writer: Store, reader: Store, *, rank: int, world: int, beat_s: float
    ) -> None:
        self._writer, self._reader = writer, reader
        self._rank, self._world, self._beat_s = rank, world, beat_s
        self.begun = 0
        self._beats = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    @classmethod
    def open(cls, store: Store, *, rank: int, world: int, beat_s: float) -> Heartbeats:
        """Over new connections to ``store``; the first beat is there when this returns."""
        writer, reader = store.clone(), store.clone()  # type: ignore[attr-defined]
        heartbeats = cls(writer, reader, rank=rank, world=world, beat_s=beat_s)
        heartbeats._beat()
        heartbeats._thread.start()
        return heartbeats

    def close(self) -> None:
        """End; again is harmless."""
        self._closed.set()
        self._thread.join(ANSWER_S)

    def _run(self) -> None:
        while not self._closed.wait(self._beat_s):
            try:
                self._beat()
            except RuntimeError:
                # The store is gone, and with it a rank: the training thread will notice.
                return

    def _beat(self) -> None:
        """This rank lives, and has begun so many transfers."""
        self._beats += 1
        self._writer.set(_key(self._rank), f"{self._beats} {self.begun}")

    @property
    def look_s(self) -> float:
        """How long `look` takes."""
        return 2.5 * self._beat_s

    def look(self) -> Standing:
        """Who waits for whom. Takes two beats and a half."""
        first = self._read()
        time.sleep(self.look_s)
        second = self._read()
        if not first or not second:
            return Standing("the store that holds the ranks' heartbeats does not answer", False)
        others = [rank for rank in sorted(second) if rank != self._rank]
        silent = [rank for rank in others if second[rank] == first.get(rank)]
        behind = [rank for rank in others if rank not in silent and second[rank][1] < self.begun]
        parts = [f"no sign of life from {ranks_in_words(silent)}"] if silent else []
        parts += [f"still behind: {ranks_in_words(behind)}"] if behind else []
        waited_for = any(second[rank][1] > self.begun for rank in others)
        return Standing("; ".join(parts), waited_for)

    def _read(self) -> Mapping[int, tuple[int, int]]:
        """Rank -> beats, transfers begun; nothing if there was no answer in time."""
        read: dict[int, tuple[int, int]] = {}

        def ask() -> None:
            keys = [_key(rank) for rank in range(self._world)]
            try:
                values = self._reader.multi_get(keys)
            except RuntimeError:
                return
            for rank, value in enumerate(values):
                beats, begun = value.decode().split()
                read[rank] = int(beats), int(begun)

        asking = threading.Thread(target=ask, name="heartbeats", daemon=True)
        asking.start()
        asking.join(ANSWER_S)
        return {} if asking.is_alive() else read


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"


def ranks_in_words(ranks: list[int]) -> str:
    """ "rank 3", or "ranks 1, 2"; at most eight of them, "" for none."""
    if not ranks:
        return ""
    some = ", ".join(map(str, ranks[:8])) + (" and more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {some}"
