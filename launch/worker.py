"""One rank: work, and leave so that the peers notice at once if that fails."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from distmoe.config import Config, ConfigError, RankInfo
from distmoe.launch.env import (
    export_determinism,
    export_local_rank,
    hide_torch_warnings,
    let_segments_grow,
)
from distmoe.launch.local import STOPPED, WRONG_CONFIG, die_with

LOST_PEER = ("Connection closed by peer", "Connection reset", "Broken pipe")
# What gloo adds to it.
SMALL_TALK = " This is typically"


def run_worker(config: Config, ranks: RankInfo, *, debug: bool = False) -> int:
    """Train as one rank; the exit code, if this is the only rank or all went well."""

    def work() -> int:
        if config.run.deterministic:
            export_determinism()
        from distmoe.train.trainer import train

        return 0 if train(config, ranks) else STOPPED

    return run_rank("train", ranks, work, debug=debug)


def run_rank(command: str, ranks: RankInfo, work: Callable[[], int], *, debug: bool = False) -> int:
    """``work`` as one rank of `distmoe COMMAND`, and its exit code; an error is one line, and ends
    the process at once if there are peers."""
    # A Ctrl-C before the work takes it over ends the process, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if ranks.source in ("torchrun", "deepspeed"):
        # An agent that is killed must not leave ranks behind, which would hold the devices.
        die_with(os.getppid())
    export_local_rank(ranks)
    before_torch(debug=debug)
    try:
        return work()
    except ConfigError as error:
        if ranks.rank == 0:
            print_problems(command, error)
        return _leave(WRONG_CONFIG, ranks)
    except Exception as error:
        if debug:
            traceback.print_exc()
        # In one write: all ranks may have something to say.
        sys.stderr.write(f"rank {ranks.rank}: {in_one_line(error)}\n")
        return _leave(1, ranks)


def before_torch(*, debug: bool) -> None:
    """Set what torch reads when it is imported; again is harmless."""
    let_segments_grow()
    if not debug:
        hide_torch_warnings()


def print_problems(command: str, error: ConfigError) -> None:
    """A line on stderr for every problem."""
    for problem in error.problems:
        print(f"distmoe {command}: error: {problem}", file=sys.stderr)


def in_one_line(error: Exception) -> str:
    """The exception's type and the first line of its message, or the peer that was lost."""
    message = next(iter(str(error).strip().splitlines()), "")
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    lost = any(sign in str(error) for sign in LOST_PEER)
    return f"lost a peer: {text.partition(SMALL_TALK)[0]}" if lost else text


def _leave(code: int, ranks: RankInfo) -> int:
    """End the process without its exit handlers, which wait for peers; a single rank has none."""
    if ranks.world > 1:
        _flush_and_exit(code)
    return code


def _flush_and_exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        # A full disk, or a reader that is gone, is not why this rank leaves.
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
