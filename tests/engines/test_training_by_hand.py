"""Engines, and ways to cut a model that the parity law leaves out, against training that shares no
code with them. DeepSpeed's line is in test_deepspeed.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from parity_runs import assert_equal_runs, config_for, own_batches, relative, run
from training_by_hand import OPTIM, STEPS, train_by_hand

from distmoe.config import Config, RoundingConfig
from distmoe.kernels.testing import assert_as_good_as

REPLICATED = {"parallel.dp_replicate": 2, "parallel.dp_shard": 2}
# The first step is clipped, the others are not.
MUON = {"optim.name": "muon", "optim.clip_norm": 0.81}
SIX_EXPERTS = {"num_experts": 6, "rounding": RoundingConfig("balance", tile=8, balance_groups=2)}
FIVE_EXPERTS = {"num_experts": 5, "rounding": RoundingConfig("balance", tile=8, balance_groups=1)}

# Name -> world, ep, sequences of a micro-batch, and what else is set.
LINES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "single": (1, 1, 4, {"engine": "single"}),
    # Two micro-batches.
    "replicated, kept gathered, ungated": (
        4, 2, 1,
        {
            "settings": REPLICATED | {"parallel.reshard_after_forward": False},
            "moe": {"activation": "relu2"},
        },
    ),
    "tied, kept gathered": (
        2, 2, 2,
        {"settings": {"model.tie_embeddings": True, "parallel.reshard_after_forward": False}},
    ),
    # Four ranks share six experts, so each holds some rows of all. Columns of w_out are no
    # multiple of 4.
    "cut by rows, reduced once": (
        4, 1, 1,
        {
            "moe": SIX_EXPERTS | {"intermediate_size": 6},
            "settings": {"parallel.reduce_gradients": "step"},
        },
    ),
    "muon": (1, 1, 4, {"engine": "single", "settings": MUON}),
    # Experts are cut over both axes and stay whole, the other matrices are not.
    "muon, sharded": (4, 2, 2, {"settings": MUON}),
    "muon, replicated, ungated, cut by rows": (
        4, 1, 2,
        {
            "settings": MUON | REPLICATED,
            "moe": FIVE_EXPERTS | {"activation": "relu2", "intermediate_size": 6},
        },
    ),
}  # fmt: skip


def assert_initial(initial: dict[str, np.ndarray], config: Config) -> None:
    """Norms 1; matrices drawn with the model's deviation, outputs of residual branches with less,
    and no two alike."""
    model = config.model
    drawn = {name: value for name, value in initial.items() if value.ndim > 1}
    assert all((value == 1).all() for name, value in initial.items() if name not in drawn)
    for name, value in drawn.items():
        is_residual = any(part in name for part in ("o_proj", "out_proj", "w_out"))
        std = model.init_std / ((2 * model.n_layers) ** 0.5 if is_residual else 1)
        # Five standard errors.
        assert abs(value.std() / std - 1) < 5 / (2 * value.size) ** 0.5, name
        assert abs(value.mean() / std) < 5 / value.size**0.5, name
    together = np.concatenate([value.ravel() for value in drawn.values()])
    assert len(np.unique(together)) > 0.95 * len(together)


def by_hand(initial: dict[str, np.ndarray], config: Config) -> dict[str, Any]:
    """What ``config`` has to give: the ranks of an ep group round their sequences together."""
    population = config.train.micro_batch_size * config.parallel.ep
    batches = [own_batches(step, 0, 1, population) for step in range(STEPS)]
    want = train_by_hand(config, initial, batches)
    assert min(want["norms"]) < config.optim.clip_norm < max(want["norms"])
    return want


def assert_bf16_as_good_as_by_hand(result: dict[str, Any], config: Config) -> None:
    """A run in bf16 errs at most twice as much as the same steps by hand in bf16: in the gradients
    of the first step, and in how far the weights have moved."""
    initial = result["initial"]
    in_fp32 = replace(config, train=replace(config.train, dtype="fp32"))
    exact, same_dtype = by_hand(initial, in_fp32), by_hand(initial, config)
    # It was bf16.
    assert any(relative(result["gradients"][n], g) > 1e-3 for n, g in exact["gradients"].items())

    def changes(run: dict[str, Any], part: str) -> dict[str, np.ndarray]:
        return {
            name: value - (initial[name] if part == "final" else 0)
            for name, value in run[part].items()
        }

    for part in ("gradients", "final"):
        want = changes(exact, part)
        # All parameters together, each over its largest exact number.
        together = [
            torch.cat([torch.from_numpy(own[n] / abs(w).max()).flatten() for n, w in want.items()])
            for own in (changes(run, part) for run in (result, same_dtype, exact))
        ]
        assert_as_good_as(*together, part)


@pytest.mark.parametrize("line", LINES)
def test_three_steps(line: str) -> None:
    world, ep, micro, changes = LINES[line]
    changes = changes | {"settings": OPTIM | changes.get("settings", {})}
    config = config_for(world, ep, micro, **changes)
    results = run(world, ep, micro, steps=STEPS, **changes)
    assert_initial(results[0]["initial"], config)
    want = by_hand(results[0]["initial"], config)
    for result in results:
        assert_equal_runs(result, want)
