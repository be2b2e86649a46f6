"""Batches of pieces to token ids, in order: in this process, or in several others."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from queue import SimpleQueue

import numpy as np

from distmoe.data.holdout import SplitPiece
from distmoe.data.tokenizer import Encoder

BATCH_CHARACTERS = 2_000_000
BATCH_PIECES = 4096
WAITING_BATCHES = 2
"""Batches per worker that are read ahead, so that no worker waits for the reader."""

Encoded = tuple[list[SplitPiece], list[np.ndarray]]


def encode_pieces(
    pieces: Iterable[SplitPiece], encoder: Encoder, *, workers: int
) -> Iterator[Encoded]:
    """Runs of pieces with their ids, in the order of ``pieces``, which is read lazily.

    The ids are the same for any number of workers. With more than one these are processes of their
    own, each with one thread, which end with this one, even if it is killed.
    """
    batches = _batches(pieces)
    if workers > 1:
        yield from _encode_elsewhere(batches, encoder, workers)
        return
    for batch in batches:
        yield batch, encoder.encode([item.text for item in batch])


def _batches(pieces: Iterable[SplitPiece]) -> Iterator[list[SplitPiece]]:
    """Runs of pieces that are encoded together, of about BATCH_CHARACTERS."""
    batch: list[SplitPiece] = []
    characters = 0
    for item in pieces:
        batch.append(item)
        characters += len(item.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_PIECES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode_elsewhere(
    batches: Iterable[list[SplitPiece]], encoder: Encoder, workers: int
) -> Iterator[Encoded]:
    with ExitStack() as stack:
        idle: SimpleQueue[Connection] = SimpleQueue()
        for _ in range(workers):
            idle.put(stack.enter_context(_start_worker(encoder, stack)))
        # A thread a worker: it sends a batch and waits for the answer.
        threads = ThreadPoolExecutor(workers, "distmoe-encode")
        stack.callback(threads.shutdown, cancel_futures=True)
        waiting: deque[tuple[list[SplitPiece], Future[list[np.ndarray]]]] = deque()
        for batch in batches:
            waiting.append((batch, threads.submit(_encode_by, idle, [i.text for i in batch])))
            if len(waiting) == workers * WAITING_BATCHES:
                done, ids = waiting.popleft()
                yield done, ids.result()
        while waiting:
            done, ids = waiting.popleft()
            yield done, ids.result()


def _start_worker(encoder: Encoder, stack: ExitStack) -> Connection:
    # Each has its own pipe, whose other end only this process holds: when this process is gone,
    # the worker reads the end of the pipe and leaves.
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(
        target=_work, args=(there, encoder.tokenizer.to_str(), encoder.eod_token), daemon=True
    )
    process.start()
    there.close()
    stack.callback(process.join)
    return here


def _encode_by(idle: SimpleQueue[Connection], texts: list[str]) -> list[np.ndarray]:
    """One batch by one of the idle workers. ChildProcessError if it has died."""
    worker = idle.get()
    try:
        worker.send(texts)
        ids: list[np.ndarray] = worker.recv()
    except (EOFError, OSError) as error:
        raise ChildProcessError("a process of --workers has died; the same command goes on") from (
            error
        )
    finally:
        idle.put(worker)
    return ids


def _work(connection: Connection, tokenizer_json: str, eod_token: str) -> None:
    # Ctrl-C reaches all processes; the main one ends the work.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    encoder = Encoder(tokenizer_json, eod_token)
    # The end of the pipe is the end of the work, wherever it is met.
    with suppress(EOFError, OSError):
        while True:
            connection.send(encoder.encode_in_one_thread(connection.recv()))
