"""The files that may make the host wait for a device, each for a reason; no others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "distmoe"
ROOMS = ("comm", "kernels", "model", "moe", "routing")
WAITS = re.compile(
    r"\.(item|tolist|cpu|numpy)\(\)|\.nonzero\(|\bint\(\w+\.sum\(|torch\.cuda\.synchronize"
    # An array of ordinary host memory is waited for on its way to the device, too.
    r"|torch\.(tensor|as_tensor|from_numpy)\("
)

MAY_WAIT = {
    "comm/mpi.py": "messages of host memory",
    "comm/threaded.py": "ranks as threads, for tests",
    "kernels/moe_mlp/__init__.py": "ranges on the host, for backends with host loops",
    "kernels/moe_mlp/reference.py": "a specification",
    "model/generate.py": "tokens that are to be printed",
    "moe/host_copy.py": "what is exchanged with other ranks: the one place of the layer",
    "routing/routing.py": "how many pairs there are, for callers that give no bound",
    "routing/rounding/reference.py": "a specification",
}


def waiting_files() -> set[str]:
    files = [path for room in ROOMS for path in (PACKAGE / room).resolve().rglob("*.py")]
    roots = {(PACKAGE / room).resolve(): room for room in ROOMS}
    found = set()
    for path in files:
        room = next(root for root in roots if path.is_relative_to(root))
        if WAITS.search(path.read_text()):
            found.add(f"{roots[room]}/{path.relative_to(room)}")
    return found


def test_only_these_files_wait() -> None:
    assert waiting_files() == set(MAY_WAIT)


@pytest.mark.parametrize(
    "text", ["x.item()", "counts.tolist()", "x.cpu()", "mask.nonzero()", "torch.tensor(2)"]
)
def test_a_wait_is_recognised(text: str) -> None:
    assert WAITS.search(text)
