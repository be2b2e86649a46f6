"""Says who is missing when a wait does not end.

A thread looks now and then at the wait that the training thread is in, which costs that thread one
assignment. A wait that is too long is explained once, in one line, by the messages that have not
arrived; a collective, and a rank that stands still anywhere else, by the heartbeats of the ranks. A
rank that stands still itself while others wait for it prints where it is.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from math import inf

import torch

from distmoe.comm.heartbeat import Heartbeats, ranks_in_words
from distmoe.comm.message import Message

LOOKS_PER_WARNING = 20
# To find out which of several messages are there.
PROBE_S = 0.2
# Of a stack that is printed.
MOST_CALLS = 12


class Wait:
    """One wait of ``rank`` for ``messages``, whose peers are places in ``world_ranks``."""

    def __init__(
        self,
        rank: int,
        world_ranks: Sequence[int],
        layer: str,
        kind: str,
        messages: Sequence[Message],
    ) -> None:
        self.began = time.perf_counter()
        self._rank, self._world_ranks = rank, world_ranks
        self._layer, self._kind, self._messages = layer, kind, messages
        self._backward = torch._C._current_graph_task_id() != -1
        self.missing = ""
        self.is_explained = False

    def explain(self, laggards: Callable[[], str]) -> None:
        """Find out who is missing; takes a moment. ``laggards``: what the heartbeats say."""
        self.is_explained = True
        if self.is_collective:
            self.missing = laggards()
            return
        for message in self._messages:
            threading.Thread(target=_probe, args=(message,), daemon=True).start()
        time.sleep(PROBE_S)
        self.missing = self._peers()

    @property
    def is_collective(self) -> bool:
        """Of all ranks, none of which can be told to be the late one by its message."""
        return any(message.peer is None for message in self._messages)

    def _peers(self) -> str:
        """The peers of messages that are not known to be complete."""
        peers = [m.peer for m in self._messages if m.peer is not None and not m.is_complete]
        return ranks_in_words(sorted({self._world_ranks[peer] for peer in peers}))

    def line(self, seconds: float, watchdog: Watchdog | None) -> str:
        """The wait in one line, as of ``seconds`` after it began."""
        direction = "backward" if self._backward else "forward"
        text = (
            f"rank {self._rank} has waited {seconds:.0f} s in {self._layer}, {direction}, "
            f"{self._what()}"
        )
        return text if watchdog is None else text + watchdog.slowest()

    def _what(self) -> str:
        way = self._messages[0].way
        if way == "exchange":
            who = f" ({self.missing})" if self.missing else ""
            return f"for all ranks in the collective '{self._kind}'{who}"
        # As of now: a peer that was missing at the warning may have come since.
        who = self._peers() or "nobody any more"
        return f"for '{self._kind}' {'from' if way == 'receive' else 'to reach'} {who}"


def _probe(message: Message) -> None:
    try:
        message.wait()
    except BaseException:  # noqa: BLE001
        # The training thread raises it, too.
        return


class Watchdog:
    """Watches the training thread of ``rank``; ``report`` gets a line for every wait, and every
    stand-still, of more than ``warning_s`` seconds. Made by the training thread; another one looks
    at it from ``open`` to ``close``."""

    def __init__(
        self,
        rank: int,
        *,
        warning_s: float,
        heartbeats: Heartbeats | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.waiting: Wait | None = None
        self.waited: defaultdict[int, float] = defaultdict(float)
        self._rank, self._warning_s = rank, warning_s
        self._heartbeats = heartbeats
        self._report = report or _print_to_stderr
        self._training_thread = threading.get_ident()
        self._begun = 0
        self._last = "no transfer yet"
        self._moved, self._moved_at = 0, time.perf_counter()
        self._next_look, self._blamed = self._moved_at + self._look_after_s, ""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    @classmethod
    def open(
        cls,
        rank: int,
        *,
        warning_s: float,
        heartbeats: Heartbeats | None = None,
        report: Callable[[str], None] | None = None,
    ) -> Watchdog:
        """Watching, with the arguments of the constructor."""
        watchdog = cls(rank, warning_s=warning_s, heartbeats=heartbeats, report=report)
        watchdog._thread.start()
        return watchdog

    def begun(self, kind: str, layer: str) -> None:
        """The training thread begins a transfer, which all ranks do in the same order."""
        self._count(f"'{kind}' in {layer}")

    def begun_step(self, step: int) -> None:
        """The training thread begins a step: what a rank that stays away from it has not done."""
        self._count(f"the beginning of step {step}")

    def _count(self, what: str) -> None:
        self._begun += 1
        if self._heartbeats is not None:
            self._heartbeats.begun = self._begun
        self._last = what

    def close(self) -> None:
        """End; again is harmless."""
        self._closed.set()
        self._thread.join(PROBE_S)

    def slowest(self) -> str:
        """The peer that was waited for longest in all, as the end of a line."""
        if not self.waited:
            return ""
        rank, seconds = max(self.waited.items(), key=lambda item: item[1])
        return f"; slowest so far: rank {rank}, {seconds:.1f} s in all before this"

    @property
    def _look_after_s(self) -> float:
        """Heartbeats take a while to compare, and the line is due after ``warning_s``."""
        look_s = self._heartbeats.look_s if self._heartbeats is not None else 0.0
        return max(0.0, self._warning_s - look_s)

    def stand_still(self, at_least_s: float) -> str:
        """One line about a stand-still outside of any wait that was reported and has lasted
        ``at_least_s`` by now; else ""."""
        seconds = time.perf_counter() - self._moved_at
        if not self._blamed or self._begun != self._moved or seconds < at_least_s:
            return ""
        return (
            f"rank {self._rank} has begun no transfer for {seconds:.0f} s, the last was "
            f"{self._last}; {self._blamed}{self.slowest()}"
        )

    def _run(self) -> None:
        while not self._closed.wait(self._warning_s / LOOKS_PER_WARNING):
            now = time.perf_counter()
            wait = self.waiting
            if self._moved != self._begun or wait is not None:
                self._moved, self._moved_at, self._blamed = self._begun, now, ""
                self._next_look = now + self._look_after_s
            if wait is not None:
                self._look_at(wait, now)
            elif now > self._next_look:
                # Said once; but others may come to wait for this rank later.
                said = self._look_around()
                self._next_look = inf if said else time.perf_counter() + self._look_after_s

    def _look_around(self) -> bool:
        """The training thread stands still outside of any wait: for others, or they for it, which
        is reported."""
        if self._heartbeats is None:
            return True
        self._blamed, is_waited_for = self._heartbeats.look()
        line = self.stand_still(0.0)
        if not line and is_waited_for and self._begun == self._moved:
            line = self._place()
        if line:
            self._report(line)
        return bool(line)

    def _place(self) -> str:
        """Where the training thread is, with its innermost calls."""
        seconds = time.perf_counter() - self._moved_at
        frame = sys._current_frames().get(self._training_thread)
        calls = traceback.format_stack(frame)[-MOST_CALLS:] if frame is not None else []
        return (
            f"rank {self._rank} keeps other ranks waiting: it has begun no transfer for "
            f"{seconds:.0f} s, the last was {self._last}; it is at\n{''.join(calls).rstrip()}"
        )

    def _look_at(self, wait: Wait, now: float) -> None:
        limit_s = self._look_after_s if wait.is_collective else self._warning_s
        if now - wait.began > limit_s and not wait.is_explained:
            wait.explain(self._missing_in_a_collective)
            if self.waiting is wait and wait.missing:
                self._report(wait.line(time.perf_counter() - wait.began, self))

    def _missing_in_a_collective(self) -> str:
        if self._heartbeats is None:
            return "without heartbeats nobody can say which"
        return self._heartbeats.look().laggards or "no rank is behind"


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
