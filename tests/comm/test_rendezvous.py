"""Who is missing at the start, and what differs: ranks as threads, with a real store."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

from torch._C._distributed_c10d import Store, TCPStore

from distmoe.comm.rendezvous import meet
from distmoe.config import ConfigError, RankInfo
from distmoe.launch.ports import free_port

SHORT_S = 1.0
ALIKE = {"optim.lr": "0.1", "moe.top_k": "2"}


def meeting(
    facts: Sequence[Mapping[str, str] | None],
    *,
    problems: Mapping[int, str] | None = None,
    port: int = 0,
) -> dict[int, Store | Exception]:
    """What every rank gets; one without facts does not come."""
    world, port = len(facts), port or free_port()
    got: dict[int, Store | Exception] = {}

    def come(rank: int, own: Mapping[str, str]) -> None:
        ranks = RankInfo(rank, world, rank, world, "127.0.0.1", port, "local")
        try:
            got[rank] = meet(ranks, own, timeout_s=SHORT_S, problem=(problems or {}).get(rank, ""))
        except Exception as error:
            got[rank] = error

    threads = [
        threading.Thread(target=come, args=(rank, own))
        for rank, own in enumerate(facts)
        if own is not None
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


def problems_of(got: Mapping[int, Store | Exception]) -> list[str]:
    """Those that all ranks were told."""
    told = [error.problems for error in got.values() if isinstance(error, ConfigError)]
    assert len(told) == len(got)
    assert all(one == told[0] for one in told)
    return told[0]


def test_ranks_that_are_alike_share_a_store() -> None:
    got = meeting([ALIKE] * 3)
    first, second, _ = got.values()
    assert isinstance(first, Store)
    assert isinstance(second, Store)
    first.set("key", "value")
    assert second.get("key") == b"value"
    # The keys of the meeting have names of their own.
    assert not first.check(["digest/0"])


def test_what_differs_is_named_with_its_ranks() -> None:
    other = {**ALIKE, "optim.lr": "0.5"}
    assert problems_of(meeting([ALIKE, other, ALIKE, {**other, "moe.top_k": "1"}])) == [
        "moe.top_k is 2 on ranks 0, 1, 2 and 1 on rank 3; it must be the same on all ranks",
        "optim.lr is 0.1 on ranks 0, 2 and 0.5 on ranks 1, 3; it must be the same on all ranks",
    ]


def test_a_problem_of_one_rank_is_told_by_all() -> None:
    # Its facts may differ because of it.
    got = meeting([ALIKE, {}, ALIKE], problems={1: "there is no GPU"})
    assert problems_of(got) == ["there is no GPU (rank 1)"]
    everybody = {rank: "there is no GPU" for rank in range(3)}
    assert problems_of(meeting([ALIKE] * 3, problems=everybody)) == ["there is no GPU"]


def test_who_does_not_come_is_named() -> None:
    for error in meeting([ALIKE, None, ALIKE, None]).values():
        assert isinstance(error, TimeoutError)
        assert str(error).startswith("2 of 4 ranks have come in launch.timeout_s (1)")
        assert str(error).endswith("missing: ranks 1, 3")


def test_nobody_opens_the_address() -> None:
    begun = time.monotonic()
    (error,) = meeting([None, ALIKE]).values()
    assert isinstance(error, TimeoutError)
    assert "rank 0 has not opened 127.0.0.1:" in str(error)
    assert time.monotonic() - begun < 3 * SHORT_S


def test_a_port_of_another_job() -> None:
    other = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    got = meeting([ALIKE, ALIKE], port=other.port)
    assert isinstance(got[0], ConfigError)
    assert got[0].problems[0].startswith(f"MASTER_PORT is {other.port}; it must be free on 127.0")
    assert isinstance(got[1], TimeoutError)
    assert str(got[1]).endswith("missing: rank 0")
