"""Cause every fault of docs/faults.md in a real run, and show what a user sees.

python tools/show_faults.py
python tools/show_faults.py nan-gradient killed --json faults.json

Runs are of two ranks of a tiny model, on CPUs with gloo. Exit code: 1 if a run ended with another
code than it should, did not say what it should, or printed a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from faulty_place import CONFIG, Run, Seen, make_place, small_disk

from distmoe.arguments import new_file
from distmoe.config import RankInfo
from distmoe.data.cli import main as data_main
from distmoe.launch.env import worker_environment
from distmoe.launch.ports import free_port

Cause = Callable[[Path], Seen]
"""Of the folder of one fault."""


@dataclass(frozen=True)
class Fault:
    """``code`` and ``says`` are of the run at whose end the fault is seen."""

    code: int
    says: str
    cause: Cause

    def problems(self, seen: Seen) -> list[str]:
        """What is not as it should be."""
        wrong = []
        if seen.code != self.code:
            wrong.append(f"exit code {seen.code} instead of {self.code}")
        if not any(self.says in line for line in seen.lines):
            wrong.append(f"nothing says '{self.says}'")
        if seen.traceback:
            wrong.append("a traceback")
        return wrong


def spoiled(spoil: Callable[[Path], object], cause: Cause) -> Cause:
    def spoil_first(folder: Path) -> Seen:
        spoil(folder)
        return cause(folder)

    return spoil_first


def trains(options: str = "", *, fault: str = "") -> Cause:
    """A run to its end; ``fault``: of faulty_run.py."""
    return lambda folder: Run(folder, options, fault).finish()


def edited(old: str, new: str) -> Cause:
    """A run with something else in its config file."""
    return spoiled(
        lambda folder: (folder / "config.toml").write_text(CONFIG.replace(old, new)), trains()
    )


def again(
    steps: int, options: str = "", *, spoil: Callable[[Path], object] = lambda folder: None
) -> Cause:
    """A run of so many steps, and another one in its folder."""
    first = trains(f"--train.steps {steps}")
    return spoiled(lambda folder: (first(folder), spoil(folder)), trains(options))


def meanwhile(act: Callable[[Run], object], options: str = "") -> Cause:
    """A run in which something happens to its processes."""

    def cause(folder: Path) -> Seen:
        run = Run(folder, f"--train.steps 100000 {options}", "")
        run.wait_for_step(4)
        act(run)
        return run.finish()

    return cause


def by_hand(
    *options: str | None, fault: str = "", machines: int = 1, port: int | None = None
) -> Cause:
    """Two ranks, with the variables of torchrun, each with its options; None: not started."""

    def cause(folder: Path) -> Seen:
        there = {"world": 2, "local_world": 2 // machines, "master_port": port or free_port()}
        runs = []
        for rank, own in enumerate(options):
            place = RankInfo(rank=rank, local_rank=rank % (2 // machines), **there)
            if own is not None:
                runs.append(Run(folder, own, fault, worker_environment(place, threads=1)))
        seen = [run.finish() for run in runs]
        return Seen(
            max(one.code for one in seen),
            [line for one in seen for line in one.lines],
            max(one.seconds for one in seen),
            any(one.traceback for one in seen),
        )

    return cause


def on_disk(options: str, cause: Cause) -> Cause:
    """``disk`` in the folder is a file system of its own."""

    def with_disk(folder: Path) -> Seen:
        with small_disk(folder / "disk", options):
            return cause(folder)

    return with_disk


def half(name: str) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def fill_shard(folder: Path) -> None:
    shard = folder / "data/train-00000.bin"
    shard.write_bytes(b"\xff" * shard.stat().st_size)


def copy_data(folder: Path) -> None:
    """To ``other``; those in ``data`` were made otherwise."""
    shutil.copytree(folder / "data", folder / "other")
    path = folder / "data/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "settings": {"seed": 7}}))


def damage_checkpoints(pattern: str) -> Callable[[Path], None]:
    """A bit turns over in the first file of tensors of each."""

    def damage(folder: Path) -> None:
        for checkpoint in (folder / "run/checkpoints").glob(pattern):
            file = min(checkpoint.glob("*.distcp"))
            contents = bytearray(file.read_bytes())
            contents[len(contents) // 2] ^= 1
            file.write_bytes(contents)

    return damage


def fill_disk(run: Run) -> None:
    """Not even a line fits; then somebody makes room."""
    filler = run.folder / "disk/filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    time.sleep(5)
    filler.unlink()


def to_rank_1(signum: int) -> Callable[[Run], None]:
    return lambda run: os.kill(run.rank(1), signum)


def ctrl_c(run: Run) -> None:
    run.process.send_signal(signal.SIGINT)


def ctrl_c_twice(run: Run) -> None:
    # Rank 1 does not answer, so that the first has no effect.
    os.kill(run.rank(1), signal.SIGSTOP)
    for _ in range(2):
        ctrl_c(run)
        time.sleep(0.5)


def busy_port(folder: Path) -> Seen:
    """Another job's rank 0 has it."""
    from torch.distributed import TCPStore

    other = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return by_hand(SHORT, SHORT, port=other.port)(folder)


def run_folder_in_use(folder: Path) -> Seen:
    """A second run is started in the folder of one that goes on."""
    seen: list[Seen] = []

    def start_another(first: Run) -> None:
        seen.append(Run(folder, "", "").finish())
        first.process.terminate()

    meanwhile(start_another)(folder)
    return seen[0]


SHORT = "--launch.timeout_s 10"
OWN_DISK = "--run.dir disk/run"
NEWEST = "step-00000004"

FAULTS = {
    "unknown-key": Fault(2, "did you mean 'train.steps'", edited("steps = 8", "step = 8")),
    "wrong-type": Fault(2, "it must be an integer", edited("steps = 8", 'steps = "eight"')),
    "out-of-range": Fault(2, "moe.top_k is 9", trains("--moe.top_k 9")),
    "broken-toml": Fault(2, "cannot be read", edited(CONFIG, "[run\n")),
    "unknown-name": Fault(2, "did you mean sigmoid_topk?", trains("--moe.router sigmoid_top")),
    "no-base-file": Fault(2, "there is no config file", edited("base.toml", "bse.toml")),
    "wrong-world-size": Fault(2, "parallel.ep is 2", trains("--launch.nproc 3")),
    "no-data": Fault(2, "no manifest.json there", trains("--data.path nothing")),
    "damaged-data-manifest": Fault(
        2, "cannot be read", spoiled(half("data/manifest.json"), trains())
    ),
    "truncated-shard": Fault(1, "train-00000.bin", spoiled(half("data/train-00000.bin"), trains())),
    "damaged-shard": Fault(1, "at byte", spoiled(fill_shard, trains())),
    "run-folder-is-a-file": Fault(
        2, "run.dir is", spoiled(lambda folder: (folder / "run").write_text(""), trains())
    ),
    "run-folder-is-read-only": Fault(2, "run.dir is", on_disk("ro", trains(OWN_DISK))),
    "run-folder-in-use": Fault(2, "in which no other run trains", run_folder_in_use),
    "disk-is-full": Fault(1, "No space left on device", on_disk("size=1M", trains(OWN_DISK))),
    "disk-is-full-for-a-while": Fault(
        0,
        "metrics.jsonl in disk/run is NOT written",
        on_disk("size=32M", meanwhile(fill_disk, f"{OWN_DISK} --train.max_minutes 0.2")),
    ),
    "no-gpu": Fault(2, "run.device is 'cuda'", trains("--run.device cuda")),
    "too-few-devices": Fault(
        2,
        "2 ranks of a machine need a GPU each",
        trains("--run.device cuda", fault="too-few-devices"),
    ),
    "busy-port": Fault(2, "MASTER_PORT is", busy_port),
    "missing-rank": Fault(1, "missing: rank 1", by_hand(SHORT, None, machines=2)),
    "nobody-at-the-address": Fault(1, "rank 0 has not opened", by_hand(None, SHORT, machines=2)),
    "different-configs": Fault(2, "optim.lr", by_hand("", "--optim.lr 0.5 --moe.top_k 1")),
    "different-data": Fault(
        2, "the manifest of data.path is", spoiled(copy_data, by_hand("", "--data.path other"))
    ),
    "no-data-on-a-machine": Fault(
        2, "no manifest.json there", by_hand(SHORT, f"{SHORT} --data.path nothing", machines=2)
    ),
    "different-versions": Fault(
        2, "the version of distmoe is", by_hand("", "", fault="another-version")
    ),
    "no-mpi4py": Fault(1, "needs mpi4py", trains("--moe.dispatch.exchange mpi", fault="no-mpi4py")),
    "no-sonicmoe": Fault(1, "needs the package sonic-moe", trains("--moe.kernel sonicmoe")),
    "nan-gradient": Fault(0, "gradient of rank 1, micro-batch 0", trains(fault="nan-gradient")),
    "nan-batch": Fault(0, "of rank 1, micro-batch 0", trains(fault="nan-batch")),
    "nan-router": Fault(
        1,
        "train.max_skipped_steps is 3",
        trains("--train.max_skipped_steps 3", fault="nan-router"),
    ),
    "stopped-rank": Fault(
        1,
        "no sign of life from rank 1",
        meanwhile(to_rank_1(signal.SIGSTOP), "--launch.stall_warning_s 2 --launch.timeout_s 8"),
    ),
    "endless-loop": Fault(
        1,
        "rank 1 keeps other ranks waiting",
        trains("--launch.stall_warning_s 1 --launch.timeout_s 6", fault="endless-loop"),
    ),
    "killed": Fault(1, "rank 1 was killed by signal 9", meanwhile(to_rank_1(signal.SIGKILL))),
    "error-in-the-code": Fault(1, "rank 1: ", trains(fault="error-in-the-code")),
    "out-of-memory": Fault(1, "rank 1: ", trains(fault="out-of-memory")),
    "ctrl-c": Fault(75, "stopped by a signal", meanwhile(ctrl_c)),
    "ctrl-c-twice": Fault(1, "second Ctrl-C", meanwhile(ctrl_c_twice)),
    "no-such-checkpoint": Fault(2, "checkpoint.resume is", trains("--resume step-00000400")),
    "not-a-checkpoint": Fault(2, "which has a manifest.json", again(2, "--resume run")),
    "damaged-checkpoint": Fault(0, "is damaged", again(4, spoil=damage_checkpoints(NEWEST))),
    "damaged-checkpoint-by-name": Fault(
        1,
        "is damaged",
        again(4, f"--resume run/checkpoints/{NEWEST}", spoil=damage_checkpoints(NEWEST)),
    ),
    "all-checkpoints-damaged": Fault(
        1, "no sound checkpoint is left", again(4, spoil=damage_checkpoints("*"))
    ),
    "another-model": Fault(
        2, "model.hidden_size", again(2, "--model.hidden_size 64 --model.n_layers 3")
    ),
    "another-data-order": Fault(
        0,
        "changed since the checkpoint: run.seed 7",
        again(2, "--run.seed 7 --train.global_batch_size 8"),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--json", type=new_file)
    arguments = parser.parse_args(argv)
    for name in arguments.faults:
        if name not in FAULTS:
            parser.error(f"FAULT is '{name}'; it must be one of {', '.join(FAULTS)}")
    shown, failed = {}, 0
    with tempfile.TemporaryDirectory() as top:
        data = Path(top) / "data"
        data_main(["prepare", "--builtin", "shakespeare", "--out", str(data)])
        for name in arguments.faults or FAULTS:
            folder = Path(top) / name
            make_place(folder, data)
            seen = FAULTS[name].cause(folder)
            shutil.rmtree(folder)
            wrong = FAULTS[name].problems(seen)
            failed += bool(wrong)
            print(f"\n{name}: exit code {seen.code} after {seen.seconds} s", flush=True)
            lines = [line.replace(f"{folder}/", "") for line in seen.lines]
            print("\n".join(f"    {line}" for line in lines))
            print("".join(f"  WRONG: {line}\n" for line in wrong), end="", flush=True)
            shown[name] = {**asdict(seen), "lines": lines, "wrong": wrong}
    print(f"\n{len(shown) - failed} of {len(shown)} faults end as they should")
    if arguments.json:
        arguments.json.write_text(json.dumps(shown, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
