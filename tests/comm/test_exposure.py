"""What counts as exposed, on intervals made by hand."""

from __future__ import annotations

import pytest

from distmoe.comm.exposure import exposures, length, union
from distmoe.comm.timeline import Interval, Note, Pass


def interval(
    what: str, begin: float, end: float, *, peer: int | None = None, where: Pass | None = None
) -> Interval:
    return Interval(Note(what, "rows", where or Pass("a", False, 0), peer), begin, end)  # type: ignore[arg-type]


def test_union_of_spans() -> None:
    assert union([(3, 4), (0, 2), (1, 2.5), (4, 5)]) == [(0, 2.5), (3, 5)]
    assert length(union([(3, 4), (0, 2), (1, 2.5), (4, 5)])) == 4.5
    assert length(union([])) == 0


def test_what_computation_covers_is_not_exposed() -> None:
    (exposure,) = exposures(
        [
            interval("compute", 0, 4),
            # Half a second of it is neither hidden nor waited in anyway.
            interval("post", 6.5, 8.5),
            interval("send", 1, 9, peer=2),
            interval("receive", 1, 8, peer=1),
            # The first second of the wait is hidden.
            interval("wait", 3, 6, peer=1),
            interval("compute", 6, 7),
            interval("wait", 7, 8, peer=1),
            interval("wait", 9, 10, peer=2),
        ]
    )
    assert (exposure.communication, exposure.compute, exposure.duration) == (8, 5, 10)
    assert exposure.exposed == 4.5
    assert exposure.share == pytest.approx(0.45)
    assert exposure.waited_for == {1: 4, 2: 1}


def test_passes_of_a_layer_are_added_and_directions_kept_apart() -> None:
    second, backward = Pass("a", False, 1), Pass("a", True, 0)
    found = exposures(
        [
            interval("wait", 0, 1),
            interval("wait", 10, 12, where=backward),
            # Nine seconds lie between the two forwards; they belong to neither.
            interval("wait", 20, 23, where=second),
            interval("compute", 23, 24, where=second),
        ]
    )
    assert [(e.layer, e.backward, e.exposed, e.duration) for e in found] == [
        ("a", False, 4, 5),
        ("a", True, 2, 2),
    ]
