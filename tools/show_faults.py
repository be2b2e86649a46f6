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
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from faulty_place import Place, Seen, finish, small_disk

from distmoe.data.cli import main as data_main


@dataclass(frozen=True)
class Fault:
    """``code`` and ``says`` are of the run at whose end the fault is seen."""

    cause: Callable[[Place], Seen]
    code: int
    says: str
    may_trace: bool = False


FAULTS: dict[str, Fault] = {}
ENDLESS = ("--train.steps", "100000")


def fault(
    code: int, says: str, *, may_trace: bool = False
) -> Callable[[Callable[[Place], Seen]], Callable[[Place], Seen]]:
    """Register a cause under its own name."""

    def add(cause: Callable[[Place], Seen]) -> Callable[[Place], Seen]:
        FAULTS[cause.__name__.replace("_", "-")] = Fault(cause, code, says, may_trace)
        return cause

    return add


@fault(2, "did you mean 'train.steps'")
def unknown_key(place: Place) -> Seen:
    place.config.write_text(place.config.read_text().replace("steps = 8", "step = 8"))
    return place.train()


@fault(2, "it must be an integer")
def wrong_type(place: Place) -> Seen:
    place.config.write_text(place.config.read_text().replace("steps = 8", 'steps = "eight"'))
    return place.train()


@fault(2, "moe.top_k is 9")
def out_of_range(place: Place) -> Seen:
    return place.train("--moe.top_k", "9")


@fault(2, "cannot be read")
def broken_toml(place: Place) -> Seen:
    place.config.write_text("[run\n")
    return place.train()


@fault(2, "did you mean sigmoid_topk?")
def unknown_name(place: Place) -> Seen:
    return place.train("--moe.router", "sigmoid_top")


@fault(2, "there is no config file")
def no_base_file(place: Place) -> Seen:
    place.config.write_text('extends = "bse.toml"')
    (place.folder / "base.toml").write_text("")
    return place.train()


@fault(2, "parallel.ep is 2")
def wrong_world_size(place: Place) -> Seen:
    return place.train("--launch.nproc", "3")


@fault(2, "no manifest.json there")
def no_data(place: Place) -> Seen:
    return place.train("--data.path", str(place.folder / "nothing"))


@fault(2, "cannot be read")
def damaged_data_manifest(place: Place) -> Seen:
    manifest = place.own_data() / "manifest.json"
    os.truncate(manifest, manifest.stat().st_size // 2)
    return place.train()


@fault(1, "train-00000.bin")
def truncated_shard(place: Place) -> Seen:
    shard = place.own_data() / "train-00000.bin"
    os.truncate(shard, shard.stat().st_size // 2)
    return place.train()


@fault(1, "at byte")
def damaged_shard(place: Place) -> Seen:
    shard = place.own_data() / "train-00000.bin"
    with shard.open("r+b") as file:
        file.write(b"\xff" * shard.stat().st_size)
    return place.train()


@fault(2, "run.dir is")
def run_folder_is_a_file(place: Place) -> Seen:
    place.run_folder.write_text("")
    return place.train()


@fault(2, "run.dir is")
def run_folder_is_read_only(place: Place) -> Seen:
    with small_disk(place.folder / "disk", "ro"):
        return place.train("--run.dir", str(place.folder / "disk" / "run"))


@fault(1, "No space left on device")
def disk_is_full(place: Place) -> Seen:
    with small_disk(place.folder / "disk", "size=1M"):
        return place.train("--run.dir", str(place.folder / "disk" / "run"))


@fault(0, "metrics.jsonl in disk/run is NOT written")
def disk_is_full_for_a_while(place: Place) -> Seen:
    """Not even a line fits; then somebody makes room."""
    disk = place.folder / "disk"
    with small_disk(disk, "size=32M"):
        run = place.start("--run.dir", "disk/run", "--train.max_minutes", "0.1", *ENDLESS)
        run.wait_for_step(disk / "run", 4)
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        time.sleep(1)
        (disk / "filler").unlink()
        return finish(run)


@fault(2, "run.device is 'cuda'")
def no_gpu(place: Place) -> Seen:
    return place.train("--run.device", "cuda")


@fault(2, "2 ranks of a machine need a GPU each")
def too_few_devices(place: Place) -> Seen:
    return place.train("--run.device", "cuda", fault="too-few-devices")


@fault(2, "MASTER_PORT is")
def busy_port(place: Place) -> Seen:
    """Another job's rank 0 has it."""
    from torch.distributed import TCPStore

    other = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    short = ["--launch.timeout_s", "10"]
    return place.ranks(short, short, port=other.port)


@fault(1, "missing: rank 1")
def missing_rank(place: Place) -> Seen:
    """One of two machines never starts."""
    return place.alone(0)


@fault(1, "rank 0 has not opened")
def nobody_at_the_address(place: Place) -> Seen:
    """Rank 0 never starts, or is elsewhere."""
    return place.alone(1)


@fault(2, "optim.lr")
def different_configs(place: Place) -> Seen:
    return place.ranks([], ["--optim.lr", "0.5", "--moe.top_k", "1"])


@fault(2, "the manifest of data.path is")
def different_data(place: Place) -> Seen:
    own = place.own_data()
    manifest = json.loads((own / "manifest.json").read_text())
    (own / "manifest.json").write_text(json.dumps({**manifest, "settings": {"seed": 7}}))
    return place.ranks([], ["--data.path", str(place.data)])


@fault(2, "no manifest.json there")
def no_data_on_a_machine(place: Place) -> Seen:
    short = ["--launch.timeout_s", "10"]
    nothing = ["--data.path", str(place.folder / "nothing")]
    return place.ranks(short, [*short, *nothing], on_one_machine=False)


@fault(2, "the version of distmoe is")
def different_versions(place: Place) -> Seen:
    return place.ranks([], [], fault="another-version")


@fault(1, "needs mpi4py")
def no_mpi4py(place: Place) -> Seen:
    return place.train("--moe.dispatch.exchange", "mpi", fault="no-mpi4py")


@fault(1, "needs the package sonic-moe")
def no_sonicmoe(place: Place) -> Seen:
    return place.train("--moe.kernel", "sonicmoe")


@fault(0, "gradient of rank 1, micro-batch 0")
def nan_gradient(place: Place) -> Seen:
    return place.train(fault="nan-gradient")


@fault(0, "of rank 1, micro-batch 0")
def nan_batch(place: Place) -> Seen:
    return place.train(fault="nan-batch")


@fault(1, "train.max_skipped_steps is 3")
def nan_router(place: Place) -> Seen:
    return place.train("--train.max_skipped_steps", "3", fault="nan-router")


@fault(1, "no sign of life from rank 1")
def stopped_rank(place: Place) -> Seen:
    run = place.start(*(*ENDLESS, "--launch.stall_warning_s", "2", "--launch.timeout_s", "8"))
    run.wait_for_step(place.run_folder, 4)
    os.kill(run.rank(1), signal.SIGSTOP)
    return finish(run)


@fault(1, "rank 1 keeps other ranks waiting")
def endless_loop(place: Place) -> Seen:
    options = ("--launch.stall_warning_s", "1", "--launch.timeout_s", "6")
    return place.train(*options, fault="endless-loop")


@fault(1, "rank 1 was killed by signal 9")
def killed(place: Place) -> Seen:
    run = place.start(*ENDLESS)
    run.wait_for_step(place.run_folder, 4)
    os.kill(run.rank(1), signal.SIGKILL)
    return finish(run)


@fault(1, "rank 1: ")
def error_in_the_code(place: Place) -> Seen:
    return place.train(fault="error-in-the-code")


@fault(1, "rank 1: ")
def out_of_memory(place: Place) -> Seen:
    return place.train(fault="out-of-memory")


@fault(75, "stopped by a signal")
def ctrl_c(place: Place) -> Seen:
    run = place.start(*ENDLESS)
    run.wait_for_step(place.run_folder, 4)
    run.process.send_signal(signal.SIGINT)
    return finish(run)


@fault(1, "second Ctrl-C")
def ctrl_c_twice(place: Place) -> Seen:
    run = place.start(*ENDLESS)
    run.wait_for_step(place.run_folder, 4)
    # Rank 1 does not answer, so that the first has no effect.
    os.kill(run.rank(1), signal.SIGSTOP)
    for _ in range(2):
        run.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    return finish(run)


@fault(2, "checkpoint.resume is")
def no_such_checkpoint(place: Place) -> Seen:
    return place.train("--resume", str(place.folder / "step-00000400"))


@fault(2, "which has a manifest.json")
def not_a_checkpoint(place: Place) -> Seen:
    place.train("--train.steps", "2")
    return place.train("--resume", str(place.run_folder))


@fault(0, "is damaged")
def damaged_checkpoint(place: Place) -> Seen:
    place.train("--train.steps", "4")
    _spoil(place.run_folder / "checkpoints" / "step-00000004")
    return place.train()


@fault(1, "is damaged")
def damaged_checkpoint_by_name(place: Place) -> Seen:
    place.train("--train.steps", "4")
    checkpoint = place.run_folder / "checkpoints" / "step-00000004"
    _spoil(checkpoint)
    return place.train("--resume", str(checkpoint))


@fault(1, "no sound checkpoint is left")
def all_checkpoints_damaged(place: Place) -> Seen:
    place.train("--train.steps", "4")
    for checkpoint in (place.run_folder / "checkpoints").iterdir():
        _spoil(checkpoint)
    return place.train()


@fault(2, "model.hidden_size")
def another_model(place: Place) -> Seen:
    place.train("--train.steps", "2")
    return place.train("--model.hidden_size", "64", "--model.n_layers", "3")


@fault(0, "changed since the checkpoint: run.seed 7")
def another_data_order(place: Place) -> Seen:
    place.train("--train.steps", "2")
    return place.train("--run.seed", "7", "--train.global_batch_size", "8")


def _spoil(checkpoint: Path) -> None:
    """A bit of its first file of tensors turns over."""
    file = min(checkpoint.glob("*.distcp"))
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)


def problems(fault: Fault, seen: Seen) -> list[str]:
    """What is not as it should be."""
    wrong = []
    if seen.code != fault.code:
        wrong.append(f"exit code {seen.code} instead of {fault.code}")
    if not any(fault.says in line for line in seen.lines):
        wrong.append(f"nothing says '{fault.says}'")
    if seen.traceback and not fault.may_trace:
        wrong.append("a traceback")
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    for name in arguments.faults:
        if name not in FAULTS:
            parser.error(f"FAULT is '{name}'; it must be one of {', '.join(FAULTS)}")
    shown, failed = {}, 0
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        data_main(["prepare", "--builtin", "shakespeare", "--out", str(top / "data")])
        for name in arguments.faults or FAULTS:
            seen = FAULTS[name].cause(Place(top / name, top / "data"))
            wrong = problems(FAULTS[name], seen)
            failed += bool(wrong)
            print(f"\n{name}: exit code {seen.code} after {seen.seconds} s", flush=True)
            lines = [
                line.replace(f"{top}/{name}/", "").replace(f"{top}/", "") for line in seen.lines
            ]
            print("\n".join(f"    {line}" for line in lines))
            print("".join(f"  WRONG: {line}\n" for line in wrong), end="", flush=True)
            shown[name] = {**asdict(seen), "lines": lines, "wrong": wrong}
    print(f"\n{len(shown) - failed} of {len(shown)} faults end as they should")
    if arguments.json:
        arguments.json.write_text(json.dumps(shown, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
