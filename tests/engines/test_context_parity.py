"""The parity law where ranks share sequences."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from parity_runs import LATENT, LAW, UNROUNDED, assert_equal_runs, run

CHANGES: dict[str, dict[str, Any]] = {
    "rounding": {"activation_checkpoint": "selective"},
    "no rounding": UNROUNDED,
    "sequence": {"moe": {"load_balance_scope": "sequence"}},
    "documents": {"document_mask": True, "activation_checkpoint": "full"},
    "latent": LATENT,
}


@functools.cache
def oracle(name: str) -> dict[str, Any]:
    return run(1, 1, LAW[1, 1], engine="single", steps=2, **CHANGES[name])[0]


# ``micro``: sequences of a micro-batch. A population of four needs a multiple of cp as ep; without
# rounding an ep group may have parts of sequences.
@pytest.mark.parametrize(
    ("world", "cp", "ep", "micro", "name"),
    [
        (2, 2, 1, 4, "no rounding"),
        (2, 2, 2, 4, "rounding"),
        (4, 2, 2, 4, "documents"),
        (4, 2, 4, 2, "sequence"),
        (4, 4, 2, 4, "no rounding"),
        (4, 4, 4, 4, "latent"),
    ],
)
def test_parity_law_of_shared_sequences(
    world: int, cp: int, ep: int, micro: int, name: str
) -> None:
    """The same tokens are rounded together, in another order."""
    want, changes = oracle(name), CHANGES[name]
    results = run(world, ep, micro, cp=cp, steps=2, **changes)
    for result in results:
        assert_equal_runs(result, want)
    groups = [results[rank]["decisions"] for rank in range(0, world, ep)]
    assert np.array_equal(np.sum(groups, axis=0), want["decisions"])
