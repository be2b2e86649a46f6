"""One rank of tools/check_plan_memory.py: a few real steps, and what they held.

Two figures. *Storages*: bytes of the tensor storages that operators make, those that PyTorch's
allocator would count on a GPU. *Resident*: growth of the peak resident set over the process as it
was before the model, but after a small model had trained, so that code that is loaded in a first
step does not count. Both are of the steps after the first, when the optimizer's state is there.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distmoe import runtime as runtime_room
from distmoe.bench.live_storages import LiveStorages
from distmoe.comm.context import ContextPart
from distmoe.config import Config, RankInfo, load_config
from distmoe.config.batch import micro_batches
from distmoe.config.keys import with_values
from distmoe.data.batches import Batch
from distmoe.engines import Engine, StepResult, make_engine
from distmoe.launch.env import rank_info
from distmoe.mesh import build_mesh
from distmoe.runtime import Runtime
from distmoe.train.step import train_step

STEPS = 2
SMALL = {
    "model.vocab_size": 256,
    "model.hidden_size": 64,
    "model.n_layers": 2,
    "model.n_dense_layers": 1,
    "model.intermediate_size": 64,
    "moe.hidden_size": 64,
    "moe.intermediate_size": 32,
    "data.seq_len": 128,
}


class Phases:
    """An engine that tells ``storages`` which phase of a step it is."""

    def __init__(self, engine: Engine, storages: LiveStorages) -> None:
        self._engine, self._storages = engine, storages
        self.model = engine.model
        self.kept: int = 0

    def backward(self, loss: Tensor, *, last: bool) -> None:
        gc.collect()
        self.kept = self._storages.read()
        self._storages.phase = "backward"
        self._engine.backward(loss, last=last)
        self._storages.phase = "forward"

    def step(self, lr: float) -> StepResult:
        self._storages.phase = "step"
        result = self._engine.step(lr)
        self._storages.phase = "forward"
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--storages", action="store_true", help="count storages, not the process")
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    ranks = rank_info()
    with running(config, ranks) as runtime:
        load_code(with_values(config, SMALL), runtime)
        measure = of_storages if arguments.storages else of_process
        found = measure(config, runtime)
    if ranks.rank == 0:
        arguments.out.write_text(json.dumps(found))
    return 0


@contextmanager
def running(config: Config, ranks: RankInfo) -> Iterator[Runtime]:
    """The process group, or the device of one rank alone."""
    runtime = runtime_room.start(
        ranks,
        device=config.run.device,
        timeout_s=config.launch.timeout_s,
        threads=1,
        engine=config.parallel.engine,
    )
    yield runtime
    runtime_room.stop(runtime)


def load_code(config: Config, runtime: Runtime) -> None:
    """What first steps load, by steps of an engine that is dropped."""
    engine = build(config, runtime)
    for step in range(STEPS):
        one_step(config, engine, runtime, seed=step)
    engine.close()
    del engine
    gc.collect()


def build(config: Config, runtime: Runtime) -> Engine:
    mesh = None
    if runtime.group is not None:
        mesh = build_mesh(config.parallel, device_type=runtime.device.type)
    return make_engine(config, mesh, runtime.device)


def one_step(config: Config, engine: Engine, runtime: Runtime, *, seed: int) -> None:
    """An optimizer step of `distmoe train`."""
    train_step(
        engine,
        batches(config, runtime, seed=seed),
        lr=1e-4,
        moe=config.moe,
        device=runtime.device,
        group=runtime.group,
    )


def batches(config: Config, runtime: Runtime, *, seed: int) -> list[Batch]:
    """The micro-batches of this rank, of random tokens."""
    ranks, cp = runtime.ranks, config.parallel.cp
    generator = torch.Generator().manual_seed(1000 * seed + ranks.rank // cp)
    shape = (config.train.micro_batch_size, config.data.seq_len + 1)
    found = []
    for _ in range(micro_batches(config, ranks.world)):
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
        batch = Batch(tokens[:, :-1], tokens[:, 1:])
        found.append(batch.of_part(ContextPart.of_rank(ranks.rank, cp)))
    return found


def of_process(config: Config, runtime: Runtime) -> dict[str, Any]:
    """Resident bytes beyond those before the model: while it is built, after that, and the peak of
    the step after the first. On a GPU what its allocator counts."""
    meter = DeviceMeter(runtime.device) if runtime.device.type == "cuda" else ResidentMeter()
    before = meter.now()
    meter.reset()
    engine = build(config, runtime)
    build_peak = meter.peak()
    gc.collect()
    built = meter.now()
    one_step(config, engine, runtime, seed=0)
    gc.collect()
    between = meter.now()
    meter.reset()
    one_step(config, engine, runtime, seed=0)
    return {
        "building": build_peak - before,
        "built": built - before,
        "between steps": between - before,
        "peak": meter.peak() - before,
    }


class ResidentMeter:
    """Of this process, as Linux counts it; the peak can be set back."""

    def now(self) -> int:
        return _kib_of("VmRSS") << 10

    def peak(self) -> int:
        return _kib_of("VmHWM") << 10

    def reset(self) -> None:
        """The peak is from here on."""
        Path("/proc/self/clear_refs").write_text("5")


def _kib_of(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


class DeviceMeter:
    """Of one GPU, as PyTorch's allocator counts it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def reset(self) -> None:
        """The peak is from here on."""
        torch.cuda.reset_peak_memory_stats(self.device)


def of_storages(config: Config, runtime: Runtime) -> dict[str, Any]:
    """Storages by phase of a step, and the largest of them at each peak."""
    storages = LiveStorages()
    with storages:
        storages.phase = "building"
        engine = build(config, runtime)
        gc.collect()
        built = storages.read()
        phases = Phases(engine, storages)
        for step in range(STEPS):
            storages.phase = "forward"
            storages.peak.clear()
            storages.at_peak.clear()
            one_step(config, phases, runtime, seed=step)
        gc.collect()
        between = storages.read()
    return {
        "built": built,
        "between steps": between,
        "kept": phases.kept - between,
        "phases": storages.peak,
        "peak": max(storages.peak.values()),
        "largest": storages.at_peak,
    }


if __name__ == "__main__":
    sys.exit(main())
