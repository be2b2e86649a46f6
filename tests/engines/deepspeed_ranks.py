"""Ranks of the DeepSpeed tests. One start of four processes runs every case: first those of four
ranks, then ranks 0 and 1 those of two, and rank 2 those of one.

python deepspeed_ranks.py FOLDER RANK: cases from FOLDER/cases.json, results to NAME-RANK.pkl.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import training_by_hand
from parity_runs import BIASED, CPU, LAW, STEPS, config_for, logical, own_batches, train
from torch.distributed.checkpoint.state_dict_saver import save
from training_by_hand import OPTIM

from distmoe.checkpoint.load import load
from distmoe.config import Config
from distmoe.engines import Engine, make_engine
from distmoe.mesh import build_mesh
from distmoe.train.step import StepOutcome, train_step

# Small, so that the model does not fit into one bucket and some parameters are not persistent.
SMALL = {"bucket_elements": 10_000, "persistence_elements": 600}


class Run:
    """One engine and its steps. ``case``: engine, world, ep, and the settings of [deepspeed]."""

    def __init__(self, case: dict[str, Any], rank: int, **changes: Any) -> None:
        self.rank, self.world = rank, case["world"]
        self.config = config_of(case, **changes)
        mesh = None
        if case["engine"] != "single":
            mesh = build_mesh(self.config.parallel, device_type="cpu")
        self.group = None if mesh is None else dist.group.WORLD
        before = process_groups()
        self.engine: Engine = make_engine(self.config, mesh, CPU)
        self.own_groups = process_groups() - before

    def step(self, number: int, *, lr: float = 1e-3) -> StepOutcome:
        config = self.config
        return train_step(
            self.engine,
            own_batches(number, self.rank, self.world, config.train.micro_batch_size),
            lr=lr,
            moe=config.moe,
            device=CPU,
            group=self.group,
        )

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds, as arrays of the logical tensors."""
        state = self.engine.state_dict()
        moments = {
            f"{name}.{key}": value
            for name, own in state["optimizer"].items()
            for key, value in own.items()
        }
        return {
            "model": logical(self.engine, state["model"]),
            "optimizer": logical(self.engine, moments),
        }

    def close(self) -> None:
        self.engine.close()
        del self.engine
        gc.collect()


def config_of(case: dict[str, Any], *, dtype: str = "fp32", **changes: Any) -> Config:
    world, ep, cp = case["world"], case["ep"], case.get("cp", 1)
    settings = {"train.dtype": dtype, "train.compile": case.get("compile", "none")}
    return config_for(
        world,
        ep,
        LAW[world, ep] * cp,
        cp=cp,
        engine=case["engine"],
        deepspeed=SMALL | case.get("deepspeed", {}),
        settings=settings | changes.pop("settings", {}),
        **changes,
    )


def parity(case: dict[str, Any], rank: int, folder: Path) -> dict[str, Any]:
    # Graphs without machine code, of which each would take seconds.
    without_code = partial(torch.compile, backend="aot_eager_decomp_partition")
    with patch("distmoe.model.compile_dense.torch.compile", without_code):
        return train(rank, config_of(case), case["world"], case.get("steps", STEPS))


def by_hand(case: dict[str, Any], rank: int, folder: Path) -> dict[str, Any]:
    return train(rank, config_of(case, settings=OPTIM), case["world"], training_by_hand.STEPS)


def skip(case: dict[str, Any], rank: int, folder: Path) -> dict[str, Any]:
    """Steps 0, 1, 2, with two between the first two that are not finite on the last rank."""
    dtype = case.get("dtype", "fp32")
    plain = Run(case, rank, dtype=dtype)
    want = [plain.step(number).loss for number in range(3)]
    plain.close()
    spoilt = Run(case, rank, dtype=dtype)
    engine, is_last = spoilt.engine, rank == case["world"] - 1
    losses = [spoilt.step(0).loss]
    before = spoilt.state()
    backward = engine.backward
    engine.backward = lambda loss, last: backward(  # type: ignore[method-assign]
        loss * (float("nan") if is_last else 1), last=last
    )
    outcomes = [spoilt.step(1)]
    engine.backward = backward  # type: ignore[method-assign]
    hook = engine.model.register_forward_hook(
        # Its gradients are finite.
        lambda module, inputs, out: replace(
            out, token_loss=out.token_loss + (float("inf") if is_last else 0)
        )
    )
    outcomes.append(spoilt.step(1))
    hook.remove()
    after = spoilt.state()
    losses += [spoilt.step(number).loss for number in (1, 2)]
    spoilt.close()
    return {
        "skipped": [outcome.skipped for outcome in outcomes],
        "before": before,
        "after": after,
        "losses": losses,
        "want": want,
    }


def bf16(case: dict[str, Any], rank: int, folder: Path) -> dict[str, Any]:
    config = config_of(case, **training_by_hand.BF16)
    return train(rank, config, case["world"], training_by_hand.STEPS)


def write(case: dict[str, Any], rank: int, folder: Path) -> dict[str, Any]:
    """Two steps, a checkpoint, two more."""
    run = Run(case, rank, **BIASED)
    for number in range(2):
        run.step(number)
    # Not by CheckpointStore: the thread and its group are not what is tested here.
    save(run.engine.state_dict(), checkpoint_id=folder / case["checkpoint"])
    return _go_on(run)


def read(case: dict[str, Any], rank: int, folder: Path) -> dict[str, Any]:
    run = Run(case, rank, **BIASED)
    # Whatever the engine held before.
    run.step(5)
    run.engine.load_state_dict(load(folder / case["checkpoint"], run.engine.state_dict()))
    return _go_on(run)


def _go_on(run: Run) -> dict[str, Any]:
    """The moments show in the second loss."""
    state, losses = run.state(), [run.step(number).loss for number in (2, 3)]
    waits = {group._get_backend(CPU).options._timeout.seconds for group in run.own_groups}
    run.close()
    return {"state": state, "losses": losses, "waits": waits}


def process_groups() -> set[dist.ProcessGroup]:
    """All of this process."""
    return set(dist.distributed_c10d._world.pg_map)


JOBS = {job.__name__: job for job in (parity, by_hand, skip, bf16, write, read)}


def run_cases(cases: list[dict[str, Any]], world: int, rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world
    )
    for case in cases:
        if case["world"] == world:
            result = JOBS[case["job"]](case, rank, folder)
            (folder / f"{case['name']}-{rank}.pkl").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    cases = json.loads((folder / "cases.json").read_text())
    torch.set_num_threads(1)
    run_cases(cases, 4, rank, folder)
    if rank < 2:
        run_cases(cases, 2, rank, folder)
    elif rank == 2:
        run_cases(cases, 1, 0, folder)
    # A gloo thread that frees its last tensor while the interpreter shuts down would abort it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
