"""Four gloo processes as two nodes of two: rows that are passed on train as rows sent directly."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_runs import config_file, finish, records, start

pytestmark = pytest.mark.processes


def test_level_node_gives_the_losses_of_level_rank(tmp_path: Path, data: Path) -> None:
    losses = {}
    for level in ("rank", "node"):
        config = config_file(tmp_path / level, data)
        options = ["--launch.nproc", "4", "--parallel.ep", "4", "--train.steps", "4"]
        options += ["--parallel.ranks_per_node", "2", "--moe.dispatch.level", level]
        finish(start(config, *options))
        losses[level] = [record["loss"] for record in records(config)]
        sent = [record["remote_mib"] for record in records(config)]
        assert all(mib > 0 for mib in sent)
    assert losses["node"] == pytest.approx(losses["rank"], rel=1e-5)
