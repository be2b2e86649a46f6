"""Profiles of a run as a user makes them."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from training_runs import LONG, config_file, finish, learning, start

pytestmark = pytest.mark.processes

RANGES = (
    "attention",
    "router",
    "rounding",
    "dispatch, pairs",
    "dispatch, plan",
    "dispatch, posting",
    "dispatch, step 0",
    "experts forward, step 0",
    "experts dgrad, step 0",
    "experts wgrad",
    "combine, step 0",
    "combine",
)


def test_ranges_of_every_rank_and_layer_and_the_same_losses(
    data: Path, tmp_path: Path, long_run: Path
) -> None:
    config = config_file(tmp_path / "profiled", data)
    options = ["--train.profile=3-4", "--train.profile_ranks=all", "--model.n_layers=2"]
    recomputed = ["--train.activation_checkpoint=full"]
    output = finish(start(config, *LONG, *options, *recomputed, "--train.steps=5"))
    assert f"profiles up to step 4: {config.parent}/run/profile, of ranks 0, 1" in output
    assert re.search(r"aten::\S+ +[\d.]+ +[\d.]+% +\d", output)
    for rank in range(2):
        path = config.parent / "run/profile" / f"steps-3-4-rank-{rank}.pt.trace.json.gz"
        events = json.loads(gzip.open(path).read())["traceEvents"]
        found = Counter(event["name"] for event in events if event.get("ph") == "X")
        assert {f"layer 1: {name}" for name in RANGES} <= found.keys()
        assert found["layer 0: dense MLP"] == 2 * found["layer 0: block"]
        phases = ("data", "forward", "backward", "optimizer", "loss", "ProfilerStep#3")
        assert all(found[name] for name in phases)
    assert learning(config) == learning(long_run)[:5]
