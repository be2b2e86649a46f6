"""Save a checkpoint under every layout of ranks and load it under every other.

python tools/check_resharding.py --subset
python tools/check_resharding.py --json docs/benchmarks/resharding.json
python tools/check_resharding.py --optimizer muon --json docs/benchmarks/resharding-muon.json

A layout is an engine, a number of ranks and an ep. Each trains two steps of the same tiny model,
saves, and trains one more. Whoever loads the checkpoint must have bit for bit the same parameters,
moments and biases, as whole tensors, and the next step's loss within 1e-5. The ranks are processes
over gloo, others for every pair. Exit code: 1 if a pair differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import DTensor

from distmoe.arguments import new_file
from distmoe.bench.tool import circumstances
from distmoe.checkpoint.load import load
from distmoe.checkpoint.store import CheckpointStore, checkpoint_group
from distmoe.config import Config, RankInfo
from distmoe.config.keys import with_values
from distmoe.data.batches import Batch, rank_positions
from distmoe.engines import Engine, make_engine
from distmoe.launch.env import export_local_rank
from distmoe.mesh import build_mesh
from distmoe.registry import ENGINES, OPTIMIZERS
from distmoe.train.step import train_step

V, S, GLOBAL_BATCH, STEPS = 64, 16, 8, 2
TOLERANCE = 1e-5
TIMEOUT_S = 600.0
CPU = torch.device("cpu")
TOKENS = torch.randint(
    0, V, (STEPS + 1, GLOBAL_BATCH, S + 1), generator=torch.Generator().manual_seed(7)
)


@dataclass(frozen=True, eq=False)
class Layout:
    """``settings``: more of the engine's, by dotted key."""

    engine: str
    world: int
    ep: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        more = "".join(f"-{value}" for value in self.settings.values())
        return f"{self.engine}{more}-{self.world}-{self.ep}"


SHARDED = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))
LAYOUTS = [
    Layout("single", 1, 1),
    *(Layout("fsdp2", world, ep) for world, ep in SHARDED),
    *(Layout("deepspeed", 2, 2, {"deepspeed.zero_stage": stage}) for stage in (1, 2)),
    *(Layout("deepspeed", *ranks, {"deepspeed.zero_stage": 3}) for ranks in SHARDED),
]
SUBSET = {
    "single-1-1",
    "fsdp2-4-2",
    "deepspeed-3-4-4",
}


@dataclass(frozen=True)
class Found:
    """A load of what ``source`` saved. ``different``: tensors whose bits are not the same."""

    source: str
    target: str
    tensors: int
    different: list[str]
    loss_error: float

    @property
    def ok(self) -> bool:
        return not self.different and self.loss_error <= TOLERANCE


def layouts_with(optimizer: str) -> list[Layout]:
    """Those whose engine has it."""
    if optimizer == "adamw":
        return LAYOUTS
    settings = {"optim.name": optimizer}
    own = [one for one in LAYOUTS if one.engine != "deepspeed"]
    return [replace(one, settings={**one.settings, **settings}) for one in own]


def pairs(layouts: Sequence[Layout], *, subset: bool) -> list[tuple[Layout, Layout]]:
    """(source, target). The subset: every one of its layouts is loaded by the next one of them."""
    if not subset:
        return [(source, target) for source in layouts for target in layouts]
    few = [layout for layout in layouts if layout.name in SUBSET]
    return [(source, few[(i + 1) % len(few)]) for i, source in enumerate(few)]


def config_of(layout: Layout) -> Config:
    """A model with a dense and two MoE layers. Without rounding, whose population depends on ep."""
    return with_values(
        Config(),
        {
            "model.vocab_size": V,
            "model.hidden_size": 32,
            "model.n_layers": 3,
            "model.n_heads": 4,
            "model.n_kv_heads": 2,
            "model.head_dim": 8,
            "model.intermediate_size": 48,
            "moe.hidden_size": 32,
            "moe.intermediate_size": 16,
            "moe.num_experts": 8,
            "moe.top_k": 2,
            "moe.router": "sigmoid_topk",
            "moe.bias_update_rate": 0.01,
            "moe.rounding.rule": "none",
            "moe.rounding.tile": 8,
            "data.seq_len": S,
            "optim.lr": 1e-3,
            "optim.clip_norm": 0.05,
            "parallel.engine": layout.engine,
            "parallel.dp_shard": layout.world,
            "parallel.ep": layout.ep,
            "train.global_batch_size": GLOBAL_BATCH,
            "train.micro_batch_size": GLOBAL_BATCH // layout.world,
            "train.dtype": "fp32",
            **layout.settings,
        },
    )


def build(layout: Layout) -> tuple[Config, Engine]:
    config = config_of(layout)
    mesh = None if layout.engine == "single" else build_mesh(config.parallel, device_type="cpu")
    return config, make_engine(config, mesh, CPU)


def next_loss(engine: Engine, config: Config, step: int) -> float:
    micro, rank, world = config.train.micro_batch_size, dist.get_rank(), dist.get_world_size()
    positions = rank_positions(GLOBAL_BATCH, micro, rank=rank, world=world)
    rows = TOKENS[step][torch.from_numpy(positions)]
    return train_step(
        engine,
        [Batch(tokens[:, :-1], tokens[:, 1:]) for tokens in rows],
        lr=config.optim.lr,
        moe=config.moe,
        device=CPU,
        group=dist.group.WORLD,
    ).loss


def digests(state: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Name -> hash of the whole tensor's bytes; collective."""
    found: dict[str, str] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            found |= digests(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            text = f"{whole.dtype} {tuple(whole.shape)}".encode()
            found[f"{prefix}{name}"] = hashlib.sha256(
                text + whole.detach().contiguous().numpy().tobytes()
            ).hexdigest()
    return found


def save(layout: Layout, folder: Path) -> None:
    """Two steps, a checkpoint, and what a loader must find."""
    config, engine = build(layout)
    for step in range(STEPS):
        next_loss(engine, config, step)
    store = CheckpointStore(
        folder / layout.name,
        group=checkpoint_group(timeout_s=TIMEOUT_S),
        keep_last=1,
        asynchronous=True,
    )
    store.save(STEPS, engine.state_dict())
    expected = digests(engine.state_dict())
    loss = next_loss(engine, config, STEPS)
    store.wait()
    engine.close()
    if dist.get_rank() == 0:
        expectation = {"digests": expected, "loss": loss}
        (folder / f"{layout.name}.json").write_text(json.dumps(expectation))


def compare(source: Layout, target: Layout, folder: Path) -> None:
    """``source``'s checkpoint under ``target``; collective. Rank 0 reports."""
    config, engine = build(target)
    store = CheckpointStore(
        folder / source.name,
        group=checkpoint_group(timeout_s=TIMEOUT_S),
        keep_last=1,
        asynchronous=False,
    )
    path, _ = store.newest_sound()
    if path is None:
        raise AssertionError(f"{source.name} has saved nothing")
    engine.load_state_dict(load(path, engine.state_dict()))
    expected = json.loads((folder / f"{source.name}.json").read_text())
    own = digests(engine.state_dict())
    names = sorted(own.keys() | expected["digests"].keys())
    different = [name for name in names if own.get(name) != expected["digests"].get(name)]
    loss = next_loss(engine, config, STEPS)
    engine.close()
    error = abs(loss - expected["loss"]) / abs(expected["loss"])
    found = Found(source.name, target.name, len(names), different, error)
    if dist.get_rank() == 0:
        _report(folder, source, target).write_text(json.dumps(asdict(found)))


def be_rank(rank: int, world: int, meeting: Path, work: Callable[[], None]) -> None:
    """``work`` as one rank of a group that meets in a file."""
    torch.set_num_threads(1)
    export_local_rank(RankInfo(rank, world, rank, world))
    # It warns of slow gathers; here they only serve to look at the result.
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    store = dist.FileStore(str(meeting), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    work()
    dist.barrier()


def fork_ranks(world: int, meeting: Path, work: Callable[[], None]) -> None:
    """Ranks of their own for every case: an engine's process groups have threads that outlive it.
    A fork costs no import. RuntimeError if a rank fails, which ends the others."""
    pids = set()
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                be_rank(rank, world, meeting, work)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.add(pid)
    while pids:
        pid, status = os.wait()
        pids.discard(pid)
        if status:
            for other in pids:
                os.kill(other, signal.SIGKILL)
            raise RuntimeError(f"a rank has failed: {meeting.name}")


def run_all(folder: Path, layouts: Sequence[Layout], *, subset: bool) -> list[Found]:
    """Every save, and then every load."""
    for engine in {layout.engine for layout in layouts}:
        # Imported once, for all forks.
        ENGINES.load(engine)
    # By the first step.
    import_module("torch._dynamo")
    wanted = pairs(layouts, subset=subset)
    for layout in dict.fromkeys(source for source, _ in wanted):
        meeting = folder / f".save {layout.name}"
        fork_ranks(layout.world, meeting, partial(save, layout, folder))
    for source, target in wanted:
        meeting = folder / f".load {source.name} as {target.name}"
        fork_ranks(target.world, meeting, partial(compare, source, target, folder))
    return [
        Found(**json.loads(_report(folder, source, target).read_text()))
        for source, target in wanted
    ]


def _report(folder: Path, source: Layout, target: Layout) -> Path:
    return folder / f"{source.name} {target.name}.json"


def print_table(layouts: Sequence[Layout], found: list[Found]) -> None:
    """Rows save, columns load: the relative error of the next loss, or what differs."""
    table = Table(title="saved by (rows), loaded by (columns)", title_justify="left")
    names = [layout.name for layout in layouts]
    for name in ("", *names):
        table.add_column(name)
    by_pair = {(one.source, one.target): one for one in found}
    for source in names:
        cells = [_cell(by_pair.get((source, target))) for target in names]
        table.add_row(source, *cells)
    console = Console(highlight=False, width=max(80, 14 * (len(names) + 1)))
    console.print(table)
    good = sum(one.ok for one in found)
    worst = max(one.loss_error for one in found)
    console.print(
        f"{good} of {len(found)} pairs: {found[0].tensors} tensors with equal bits; "
        f"next loss within {worst:.1e}"
    )


def _cell(one: Found | None) -> str:
    if one is None:
        return "."
    return f"{len(one.different)} DIFFER" if one.different else f"{one.loss_error:.0e}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--subset", action="store_true", help="few layouts, each loaded by another")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw")
    parser.add_argument("--json", type=new_file)
    arguments = parser.parse_args(argv)
    begun, layouts = time.monotonic(), layouts_with(arguments.optimizer)
    with tempfile.TemporaryDirectory() as folder:
        found = run_all(Path(folder), layouts, subset=arguments.subset)
    print_table(layouts, found)
    if arguments.json:
        facts = {
            **circumstances(),
            "seconds": round(time.monotonic() - begun, 1),
            "pairs": [asdict(one) for one in found],
        }
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0 if all(one.ok for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
