"""Compare what `distmoe plan` says of memory with what real training steps hold.

    python tools/check_plan_memory.py [SHAPE ...] [--device cuda] [--json FILE]

Every shape trains a few steps on ranks of this machine, twice: once for the resident set, once for
the tensor storages, phase by phase. Exit code: 1 if a resident peak and its prediction differ by
more than 10 %. On a GPU, PyTorch's allocator is asked instead of the process.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from two_hosts import hosts

from distmoe.bench.tool import command_line
from distmoe.config import Config, resolve, to_toml
from distmoe.config.keys import with_values
from distmoe.planner.job_memory import JobMemory, predict_memory

LIMIT = 0.10
MIB = 1 << 20
RANK = Path(__file__).with_name("plan_memory_rank.py")

# So that freed memory leaves the process at once, as the resident set is what is measured.
VARIABLES = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)}
VARIABLES |= {"OMP_NUM_THREADS": "1"}

COMMON: dict[str, Any] = {
    "moe.rounding.tile": 32,
    "parallel.ranks_per_node": 2,
    "train.steps": 3,
    "model.vocab_size": 4096,
    "model.hidden_size": 512,
    "model.n_layers": 4,
    "model.n_dense_layers": 1,
    "model.n_heads": 8,
    "model.n_kv_heads": 4,
    "moe.num_experts": 16,
    "moe.top_k": 4,
    "moe.intermediate_size": 256,
    "parallel.engine": "fsdp2",
    "data.seq_len": 512,
    "train.global_batch_size": 4,
}
EXPERTS = {
    "model.n_layers": 5,
    "moe.num_experts": 32,
    "moe.intermediate_size": 512,
    "parallel.ep": 2,
    "data.seq_len": 256,
}
ZERO = {"parallel.engine": "deepspeed", "deepspeed.bucket_elements": 4_000_000}
# Ranks, and what is not common.
SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    # Many wide experts, few tokens: weights, their gradients and their reduction.
    "experts": (2, EXPERTS),
    # The same in two micro-batches, between which weights and gradients stay whole.
    "kept whole": (
        2,
        {
            **EXPERTS,
            "parallel.reshard_after_forward": False,
            "parallel.reduce_gradients": "step",
            "train.micro_batch_size": 1,
        },
    ),
    # Long sequences: activations of attention and experts, none recomputed.
    "long sequence": (
        2,
        {
            "model.vocab_size": 2048,
            "model.hidden_size": 256,
            "model.n_kv_heads": 2,
            "moe.num_experts": 8,
            "moe.top_k": 2,
            "parallel.ep": 1,
            "data.seq_len": 4096,
            "train.global_batch_size": 2,
            "train.loss_chunk_tokens": 1024,
        },
    ),
    # The same, shared by both ranks.
    "shared sequences": (
        2,
        {
            "model.vocab_size": 2048,
            "model.hidden_size": 256,
            "model.n_kv_heads": 4,
            "moe.num_experts": 8,
            "moe.top_k": 2,
            "parallel.ep": 2,
            "parallel.cp": 2,
            "data.seq_len": 4096,
            "train.global_batch_size": 1,
            "train.loss_chunk_tokens": 1024,
        },
    ),
    # A large vocabulary: logits, embedding and head; blocks are recomputed, steps accumulate.
    "vocabulary": (
        2,
        {
            "model.vocab_size": 65536,
            "model.hidden_size": 384,
            "model.n_dense_layers": 0,
            "model.n_heads": 6,
            "model.n_kv_heads": 6,
            "moe.top_k": 2,
            "moe.intermediate_size": 128,
            "parallel.ep": 2,
            "train.global_batch_size": 8,
            "train.micro_batch_size": 2,
            "train.activation_checkpoint": "full",
            "train.loss_chunk_tokens": 512,
        },
    ),
    # Rows that are passed on inside a node, and blocks that stay gathered. Choices are uniform, as
    # the prediction assumes: rank 0 need not be the busiest.
    "two nodes": (
        4,
        {
            "model.vocab_size": 1024,
            "model.n_layers": 3,
            "model.n_kv_heads": 2,
            "moe.intermediate_size": 128,
            "moe.router": "hash",
            "moe.dispatch.level": "node",
            "parallel.ep": 4,
            "parallel.reshard_after_forward": False,
            "data.seq_len": 2048,
            "train.loss_chunk_tokens": 1024,
        },
    ),
    # As many pairs for every expert: for each other number of rows oneDNN would compile a bf16
    # kernel, half a MiB.
    "single, bf16": (
        1,
        {
            "moe.router": "balanced",
            "model.vocab_size": 8192,
            "moe.top_k": 2,
            "parallel.engine": "single",
            "data.seq_len": 1024,
            "train.global_batch_size": 2,
            "train.dtype": "bf16",
            "train.activation_checkpoint": "selective",
            "train.loss_chunk_tokens": 1024,
        },
    ),
    "ZeRO 2": (2, {**ZERO, "deepspeed.zero_stage": 2, "parallel.ep": 2}),
    "ZeRO 3": (2, {**ZERO, "deepspeed.zero_stage": 3, "parallel.ep": 1}),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="every figure, added to those in it"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.shapes if name not in SHAPES]
    if unknown:
        parser.error(f"SHAPE is {unknown[0]!r}; it must be one of {', '.join(SHAPES)}")
    rows = []
    for name in arguments.shapes or SHAPES:
        rows.append(check(name, arguments.device))
        print_row(rows[-1])
    if arguments.json:
        save(rows, arguments.json)
    return 1 if any(abs(row["error"]) > LIMIT for row in rows) else 0


def save(rows: list[dict[str, Any]], file: Path) -> None:
    """Into ``file``, in place of what it has of the same shapes."""
    old = json.loads(file.read_text())["shapes"] if file.exists() else []
    by_name = {row["name"]: row for row in (*old, *rows)}
    facts = {"common": COMMON, "shapes": list(by_name.values())}
    file.write_text(json.dumps(facts, indent=1) + "\n")


def check(name: str, device: str) -> dict[str, Any]:
    """Measured and predicted bytes of one shape."""
    config, world, predicted = predict(name, device)
    process = run_ranks(config, world, storages=False)
    storages = run_ranks(config, world, storages=True)
    return {
        "name": name,
        **machine(),
        "ranks": world,
        "settings": SHAPES[name][1],
        "predicted": {**asdict(predicted), "tensors": predicted.tensors},
        "resident": process,
        "storages": storages,
        "error": predicted.tensors / process["peak"] - 1,
        "error_of_storages": predicted.tensors / storages["peak"] - 1,
    }


def predict(name: str, device: str) -> tuple[Config, int, JobMemory]:
    """The config of one shape, its ranks, and what it should hold."""
    world, settings = SHAPES[name]
    values = {**COMMON, **settings, "run.device": device}
    config = resolve(with_values(Config(), values), world, local_world=world)
    return config, world, predict_memory(config, world)


def run_ranks(config: Config, world: int, *, storages: bool) -> dict[str, Any]:
    """What rank 0 measured."""
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder, "config.toml"), Path(folder, "out.json")
        file.write_text(to_toml(config))
        command = [sys.executable, str(RANK), str(file), str(out)]
        command += ["--storages"] if storages else []
        with hosts(0) as here:
            if not here.run_ranks([command] * world, variables=VARIABLES):
                raise RuntimeError("a rank ended badly")
        found: dict[str, Any] = json.loads(out.read_text())
    return found


def print_row(row: dict[str, Any]) -> None:
    """MiB of one shape, a line a part."""
    predicted, resident, storages = row["predicted"], row["resident"], row["storages"]
    parts = ("parameters", "gradients", "optimizer", "activations", "buffers")
    told = ", ".join(f"{part} {predicted[part] / MIB:,.0f}" for part in parts)
    phases = ", ".join(f"{name} {size / MIB:,.0f}" for name, size in storages["phases"].items())
    total = predicted["tensors"] / MIB
    print(f"{row['name']}: predicted {total:,.0f} MiB at {predicted['moment']}")
    print(f"  {told}")
    print(f"  resident {resident['peak'] / MIB:,.0f}, error {row['error']:+.1%}")
    print(f"  storages {storages['peak'] / MIB:,.0f} ({phases}), {row['error_of_storages']:+.1%}")


def machine() -> dict[str, str]:
    import torch

    return {
        "command": command_line(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
