"""A program, its partitions, and who of them runs.

Partitions are threads that hand on a baton: one runs until it waits, then the program picks the
next. If none can go on, one of the copies in flight lands; if there is none either, they are stuck.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from gluon_interpreter.races import Knowledge
from gluon_interpreter.source import KernelError, Line, fault, line
from gluon_interpreter.timing import Landing, Timing
from gluon_interpreter.values import Value


class DeadlockError(KernelError):
    """Every partition waits, and no copy is in flight that could end it."""


class Abandoned(BaseException):
    """Ends the thread of a partition after another one failed."""


class InFlight(Protocol):
    """A copy that some partition may wait for."""

    def land(self) -> None: ...


class Partition:
    def __init__(self, program: Program, name: str, num_warps: int) -> None:
        self.program, self.name, self.num_warps = program, name, num_warps
        self.actor = program.new_actor()
        self.known = Knowledge()
        self.known.seen[self.actor] = 1
        self.baton = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.waits_for: Callable[[], str] = lambda: "its turn"
        self.line: Line | None = None
        # Asynchronous work that only this partition can wait for, oldest first: see `copies` and
        # `products`.
        self.copies: list[Any] = []
        self.products: list[Any] = []

    @property
    def now(self) -> tuple[int, int]:
        """The event to which accesses belong that happen now."""
        return self.actor, self.known.seen[self.actor]

    def tick(self) -> None:
        """What happens from now on is not known to those who were told before."""
        self.known.seen[self.actor] += 1

    def fence(self) -> None:
        self.known.fenced.join(self.known.seen)
        self.tick()

    def wait_until(self, ready: Callable[[], bool], waits_for: Callable[[], str]) -> None:
        self.ready, self.waits_for, self.line = ready, waits_for, line()
        self.program.switch()
        self.ready, self.waits_for = (lambda: True), (lambda: "its turn")

    def pause(self) -> None:
        """Between two operations that others can see."""
        if self.program.rng and self.program.rng.random() < 0.5:
            self.wait_until(lambda: True, lambda: "its turn")

    def leave(self) -> None:
        """Nothing may outlive the partition."""
        for kind, left in (("copy", self.copies), ("product", self.products)):
            if left:
                raise KernelError(f"{self.name} ends and never waited for the {kind} {left[0]}")


class Program:
    """One CTA. ``index``, ``grid``: its place and their number along three axes."""

    def __init__(
        self, index: tuple[int, ...], grid: tuple[int, ...], num_warps: int, timing: Timing
    ) -> None:
        self.index, self.grid, self.timing = index, grid, timing
        at_random = timing.landing is Landing.RANDOM
        self.rng = random.Random(f"{timing.seed} {index}") if at_random else None
        self.actors = 0
        self.in_flight: list[InFlight] = []
        self.failure: BaseException | None = None
        self.main = self.running = Partition(self, "the kernel", num_warps)
        self.live = [self.main]

    def new_actor(self) -> int:
        self.actors += 1
        return self.actors

    def run(self, body: Callable[[], Any]) -> None:
        _current.partition = self.main
        try:
            body()
            self.main.leave()
            if self.in_flight:
                raise KernelError(f"the kernel ends and nothing waited for {self.in_flight[0]}")
        finally:
            _current.partition = None

    def launch(self, copy: InFlight) -> None:
        """It lands later, unless the timing says at once."""
        if self.timing.landing is Landing.AT_ONCE:
            copy.land()
        else:
            self.in_flight.append(copy)

    def switch(self) -> None:
        """Let somebody run who can; back when it is our turn again."""
        before = self.running
        self.running = self._next()
        if self.running is before:
            return
        self.running.baton.release()
        before.baton.acquire()
        if self.failure is not None:
            raise Abandoned

    def _next(self) -> Partition:
        while True:
            if self.rng and self.in_flight and self.rng.random() < 0.3:
                self._land()
            ready = [p for p in self.live if p.ready()]
            if ready:
                return self.rng.choice(ready) if self.rng else ready[0]
            if not self.in_flight:
                raise DeadlockError(self._stuck())
            self._land()

    def _land(self) -> None:
        index = self.rng.randrange(len(self.in_flight)) if self.rng else 0
        self.in_flight.pop(index).land()

    def _stuck(self) -> str:
        waits = [f"{p.name} waits for {p.waits_for()} at {p.line}" for p in self.live]
        return "; ".join(["deadlock", *waits])


class _Current(threading.local):
    partition: Partition | None = None


_current = _Current()


def current() -> Partition:
    """The partition whose code is being executed."""
    if _current.partition is None:
        raise RuntimeError("Gluon operations run inside of kernels only")
    return _current.partition


def warp_specialize(
    functions_and_args: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]],
    worker_num_warps: Sequence[int],
    worker_num_regs: Sequence[int] | None = None,
) -> Any:
    """The first function in the kernel's own warps, each other one in warps of its own."""
    default, *workers = functions_and_args
    main = current()
    if main is not main.program.main or len(main.program.live) > 1:
        raise fault("warp_specialize inside of a partition")
    for given in (worker_num_warps, worker_num_regs):
        if given is not None and len(given) != len(workers):
            raise fault(f"{len(workers)} worker partitions and {len(given)} numbers for them")
    if any(has_tensor(args) for _, args in workers):
        raise fault("worker partitions take no tensors as arguments")
    threads = [
        _start(main, function, args, num_warps)
        for (function, args), num_warps in zip(workers, worker_num_warps, strict=True)
    ]
    main.tick()
    main.name = f"partition 0 ({default[0].__name__})"
    try:
        main.pause()
        result = default[0](*default[1])
        main.wait_until(lambda: main.program.live == [main], lambda: "the other partitions")
    except BaseException as error:
        raise _abandon(main.program, threads, error) from None
    main.name = "the kernel"
    for partition, thread in threads:
        thread.join()
        main.known.join(partition.known)
    return result


def has_tensor(args: tuple[Any, ...]) -> bool:
    """Tensors live in the registers of the warps that made them."""
    return any(
        has_tensor(arg) if isinstance(arg, tuple) else isinstance(arg, Value) and bool(arg.shape)
        for arg in args
    )


def _start(
    main: Partition, function: Callable[..., Any], args: tuple[Any, ...], num_warps: int
) -> tuple[Partition, threading.Thread]:
    """Its thread waits for the baton before it does anything."""
    program = main.program
    partition = Partition(
        program, f"partition {len(program.live)} ({function.__name__})", num_warps
    )
    partition.known.join(main.known)

    def run() -> None:
        partition.baton.acquire()
        if program.failure is not None:
            return
        _current.partition = partition
        try:
            with np.errstate(all="ignore"):
                function(*args)
            partition.leave()
            program.live.remove(partition)
            program.running = program._next()
        except Abandoned:
            return
        except BaseException as error:
            program.failure, program.running = error, main
        program.running.baton.release()

    thread = threading.Thread(target=run, daemon=True)
    program.live.append(partition)
    thread.start()
    return partition, thread


def _abandon(
    program: Program, threads: list[tuple[Partition, threading.Thread]], error: BaseException
) -> BaseException:
    """End the threads that are left; the error that came first."""
    program.failure = program.failure or error
    for partition, thread in threads:
        partition.baton.release()
        thread.join()
    return program.failure
