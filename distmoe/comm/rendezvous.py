"""Where the ranks of a run meet, before they are a process group.

Ranks that were not started alike wait for messages that nobody sends, or train on in silence, each
with its own settings. So all show a card with what must be the same, and whoever does not come is
named.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.rendezvous import rendezvous

from distmoe.comm.heartbeat import ranks_in_words
from distmoe.config import ConfigError, RankInfo

RETRY_S = 0.2
# Of ranks that are about to leave with an error that all know.
FAREWELL_S = 5.0


def meet(
    ranks: RankInfo, facts: Mapping[str, str], *, timeout_s: float, problem: str = ""
) -> Store:
    """The store of all ranks, when all have come with the same ``facts`` and without a problem.

    ``problem``: why this rank cannot take part. ConfigError on all ranks for one that has such, for
    facts that differ, and for a port that is taken; TimeoutError, naming them, for ranks that have
    not come in time.
    """
    store = _open_store(ranks, timeout_s)
    meeting = PrefixStore("meeting", store)
    card = json.dumps([problem, dict(facts)], sort_keys=True)
    meeting.set(f"card/{ranks.rank}", card)
    meeting.set(f"digest/{ranks.rank}", hashlib.sha256(card.encode()).hexdigest())
    _wait_for_all(meeting, ranks.world, timeout_s)
    digests = meeting.multi_get([f"digest/{rank}" for rank in range(ranks.world)])
    if problem or len(set(digests)) > 1:
        problems = list(_problems(meeting, digests))
        _leave_together(meeting, ranks)
        raise ConfigError(problems)
    return PrefixStore("group", store)


def _open_store(ranks: RankInfo, timeout_s: float) -> Store:
    address, port = ranks.master_addr, ranks.master_port
    timeout = timedelta(seconds=timeout_s)
    try:
        if ranks.source == "torchrun" and dist.is_torchelastic_launched():
            # Its agent may serve the store.
            found: Store = next(rendezvous("env://", timeout=timeout))[0]
            return found
        if ranks.rank > 0:
            _wait_for_server(address, port, timeout_s)
        return TCPStore(
            address,
            port,
            ranks.world,
            is_master=ranks.rank == 0,
            timeout=timeout,
            # Whoever does not come is named later.
            wait_for_workers=False,
        )
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"MASTER_PORT is {port}; it must be free on {address}, and another process has it"
        ) from error


def _wait_for_server(address: str, port: int, timeout_s: float) -> None:
    """torch waits, too, but then ends with pages of its own stack."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((address, port), timeout=timeout_s).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"rank 0 has not opened {address}:{port} (MASTER_ADDR, MASTER_PORT) in "
                    f"launch.timeout_s ({timeout_s:g}): {error}"
                ) from error
        time.sleep(RETRY_S)


def _wait_for_all(meeting: Store, world: int, timeout_s: float) -> None:
    """TimeoutError for those whose digest is not there in time."""
    keys = [f"digest/{rank}" for rank in range(world)]
    try:
        meeting.wait(keys, timedelta(seconds=timeout_s))
    except DistStoreError as error:
        missing = [rank for rank, key in enumerate(keys) if not meeting.check([key])]
        if not missing:
            raise
        raise TimeoutError(
            f"{world - len(missing)} of {world} ranks have come in launch.timeout_s "
            f"({timeout_s:g}); missing: {ranks_in_words(missing)}"
        ) from error


def _problems(meeting: Store, digests: Sequence[bytes]) -> Iterator[str]:
    """What is wrong, a line each, from one card of each kind."""
    kinds: defaultdict[bytes, list[int]] = defaultdict(list)
    for rank, digest in enumerate(digests):
        kinds[digest].append(rank)
    cards = [(json.loads(meeting.get(f"card/{some[0]}")), some) for some in kinds.values()]
    broken = [(problem, some) for (problem, _), some in cards if problem]
    for problem, some in broken:
        yield problem if len(some) == len(digests) else f"{problem} ({ranks_in_words(some)})"
    if not broken:
        yield from _differences([(facts, some) for (_, facts), some in cards])


def _differences(cards: Sequence[tuple[dict[str, str], list[int]]]) -> Iterator[str]:
    for name in sorted({name for facts, _ in cards for name in facts}):
        ranks_of: defaultdict[str, list[int]] = defaultdict(list)
        for facts, some in cards:
            ranks_of[facts.get(name, "missing")] += some
        if len(ranks_of) > 1:
            values = (f"{value} on {ranks_in_words(sorted(r))}" for value, r in ranks_of.items())
            yield f"{name} is {' and '.join(values)}; it must be the same on all ranks"


def _leave_together(meeting: Store, ranks: RankInfo) -> None:
    """The store ends with rank 0, and the others still read."""
    meeting.set(f"read/{ranks.rank}", "")
    if ranks.rank == 0:
        with contextlib.suppress(DistStoreError):
            everybody = [f"read/{rank}" for rank in range(ranks.world)]
            meeting.wait(everybody, timedelta(seconds=FAREWELL_S))
