"""How each command of the documentation is checked: with what it says, and without what it needs,
which may be GPUs, other machines or hours.

| program | what is run |
|---|---|
| `distmoe train` | itself, with the ranks of its launcher, up to the start of the work |
| `distmoe config` | itself |
| `distmoe plan` | itself, up to the search |
| `distmoe launch` | itself, with `--dry-run` |
| `distmoe doctor` | itself, up to the start of the checks or measurements |
| other commands of distmoe, `python tools/...` | themselves, until the arguments are understood |
| `torchrun`, `deepspeed` | their own parsers, then the command of distmoe that they would start |
| `srun`, `mpiexec`, `sbatch` | their options by `OPTIONS`, then the same |
| `make` | a target of the Makefile |
| `pip` | the extras that it names are those of pyproject.toml |
| scripts | `bash -n` |
| `jq` | itself, where it is installed |

The tutorial's commands really run: test_tutorial.py.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

from pages import ROOT
from shell import Command

from distmoe.config import load_config
from distmoe.launch.cli import main as distmoe_main

# What a reader puts in place of these words.
PLACEHOLDERS = {
    "FILE": "configs/eight_gpu.toml",
    "RUN": "runs/quickstart",
    "CHECKPOINT": "runs/quickstart",
    "MODEL_DIR": "OLMoE-1B-7B-0924",
    "$RANK": "0",
    "$HEAD": "node1",
}
# Options of other people's programs that the documentation uses.
OPTIONS = {
    "srun": {"--nodes", "--ntasks-per-node", "--gpus-per-node"},
    "sbatch": {"--nodes", "--gpus-per-node"},
    "mpiexec": {"-n"},
    "tensorboard": {"--logdir"},
}
# What follows these is written, and need not be there before.
WRITTEN = {
    "--out",
    "--json",
    "--write",
    "--write-tiles",
    "--picture",
    "--save",
    "--html",
    "--markdown",
    "--csv",
    "--run.dir",
}
# Settings that are refused where a package is missing: left out then.
PACKAGES = {"--metrics.wandb": "wandb"}
FILE = re.compile(r"[^$:=|]*(/|\.(toml|py|sh|sbatch|jsonl?|txt|html|csv|png)$)[^$:=|]*")
# The functions with which work begins.
WORK = (
    "distmoe.launch.cli.run_worker",
    "distmoe.launch.cli._train_here",
    "distmoe.planner.plan_job.Planner.plan",
    "distmoe.launch.doctor.cli._situation",
    "distmoe.launch.doctor.comm.run_local",
    "distmoe.launch.doctor.comm.run_rank",
)


class Understood(BaseException):
    """A program has understood its arguments, and would begin to work."""

    def __init__(
        self, arguments: argparse.Namespace | None = None, rest: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.arguments, self.rest = arguments, rest


def check(command: Command) -> None:
    """AssertionError if the command is in no class, names what is not there, or is refused."""
    program, *words = (PLACEHOLDERS.get(word, word) for word in command.words)
    missing = [word for word in files(words) if not glob.glob(word)]
    assert not missing, f"{command}: there is no {', '.join(missing)}"
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if program.endswith(".sh"):
                script([program])
            else:
                assert program in CHECKS, f"no class for '{program}'"
                CHECKS[program](words)
    except (AssertionError, ValueError, SystemExit) as error:
        raise AssertionError(f"{command}: {error} {said.getvalue()}") from error


def files(words: Sequence[str]) -> Iterator[str]:
    """The words that are files or folders which a command reads."""
    for before, word in zip(("", *words), words, strict=False):
        option, _, value = word.rpartition("=") if word.startswith("-") else ("", "", word)
        if FILE.fullmatch(value) and before not in WRITTEN and option not in WRITTEN:
            yield value


def distmoe(words: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """`distmoe WORDS`, as a rank with ``environment`` or as the user."""
    words = list(words)
    for option, package in PACKAGES.items():
        if option in words and find_spec(package) is None:
            place = words.index(option)
            del words[place : place + 2]
    with contextlib.ExitStack() as stack:
        for work in WORK:
            stack.enter_context(mock.patch(work, side_effect=Understood()))
        stack.enter_context(mock.patch.dict(os.environ, environment or {}))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if words[0] not in ("train", "config", "plan", "launch", "doctor"):
            stack.enter_context(until_understood())
        dry_run = ("--dry-run",) if words[0] == "launch" else ()
        try:
            code = distmoe_main([*words, *dry_run])
        except Understood:
            code = 0
    assert code == 0, f"exit code {code}"


def python(words: Sequence[str]) -> None:
    if words[0] == "-m":
        started(words[1:], world=1, on_node=1)
        return
    with until_understood():
        try:
            run_tool(words)
        except Understood as it:
            # What is left are settings of a run.
            if it.rest:
                load_config(it.arguments.file, it.rest)


def run_tool(words: Sequence[str]) -> None:
    """`python WORDS`, in this process."""
    path = [str(Path(words[0]).resolve().parent), *sys.path]
    with mock.patch.object(sys, "argv", list(words)), mock.patch.object(sys, "path", path):
        runpy.run_path(words[0], run_name="__main__")


@contextlib.contextmanager
def until_understood() -> Iterator[None]:
    """Programs that read their arguments by argparse raise `Understood` once they have."""
    parse_args = argparse.ArgumentParser.parse_args
    parse_known_args = argparse.ArgumentParser.parse_known_args
    depth = 0

    def known(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            found = parse_known_args(self, *args, **kwargs)
        finally:
            depth -= 1
        # Parsers of subcommands, and parse_args, call this one.
        if not depth:
            raise Understood(*found)
        return found

    def exact(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            found = parse_args(self, *args, **kwargs)
        finally:
            depth -= 1
        raise Understood(found, ())

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", exact),
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", known),
    ):
        yield


def started(words: Sequence[str], *, world: int, on_node: int) -> None:
    """The command that a launcher starts as each of ``world`` ranks."""
    program, *rest = words
    assert program == "distmoe", f"'{program}' is started; only distmoe is known"
    distmoe(
        rest,
        {
            "RANK": "0",
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": str(on_node),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "29500",
        },
    )


def torchrun(words: Sequence[str]) -> None:
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(list(words))
    on_node = int(given.nproc_per_node)
    nodes = int(given.nnodes.rpartition(":")[2])
    if not given.module:
        # An example, which test_examples.py starts.
        assert Path(given.training_script).is_file()
        return
    program = [given.training_script, *given.training_script_args]
    started(program, world=nodes * on_node, on_node=on_node)


def deepspeed(words: Sequence[str]) -> None:
    from deepspeed.launcher.runner import fetch_hostfile, parse_args

    given = parse_args(list(words))
    slots = fetch_hostfile(given.hostfile) or {"localhost": 8}
    assert given.module, "deepspeed without --module"
    program = [given.user_script, *given.user_args]
    started(program, world=sum(slots.values()), on_node=next(iter(slots.values())))


def srun(words: Sequence[str]) -> None:
    given, rest = own_options("srun", words)
    on_node = int(given["--ntasks-per-node"])
    started(rest, world=int(given.get("--nodes", "1")) * on_node, on_node=on_node)


def sbatch(words: Sequence[str]) -> None:
    given, rest = own_options("sbatch", words)
    script(rest[:1])
    on_node = int(given["--gpus-per-node"])
    started(["distmoe", "train", *rest[1:]], world=int(given["--nodes"]) * on_node, on_node=on_node)


def mpiexec(words: Sequence[str]) -> None:
    given, rest = own_options("mpiexec", words)
    started(rest, world=int(given["-n"]), on_node=int(given["-n"]))


def tensorboard(words: Sequence[str]) -> None:
    _, rest = own_options("tensorboard", words)
    assert not rest, f"{rest} is left"


def own_options(program: str, words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The options before the first other word with their values, and the rest."""
    given: dict[str, str] = {}
    rest = list(words)
    while rest and rest[0].startswith("-"):
        option, equals, value = rest.pop(0).partition("=")
        assert option in OPTIONS[program], f"{program} has no {option} in OPTIONS"
        given[option] = value if equals else rest.pop(0)
    return given, rest


def make(words: Sequence[str]) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    unknown = [word for word in words if "=" not in word and word not in targets]
    assert not unknown, f"no such targets: {unknown}"


def pip(words: Sequence[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        unknown = set(extras.split(",")) - set(project["optional-dependencies"])
        assert not unknown, f"no such extras: {unknown}"


def script(words: Sequence[str]) -> None:
    """Each word that names a script: bash understands it."""
    for path in re.findall(r"[\w./]+\.(?:sh|sbatch)\b", " ".join(words)):
        done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def jq(words: Sequence[str]) -> None:
    if shutil.which("jq"):
        read = [file for word in words for file in glob.glob(word) or [word]]
        done = subprocess.run(["jq", *read], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def source(words: Sequence[str]) -> None:
    """Of the environment that `make` makes."""
    assert words == [".venv/bin/activate"]


CHECKS: dict[str, Callable[[Sequence[str]], None]] = {
    "distmoe": distmoe,
    "python": python,
    "torchrun": torchrun,
    "deepspeed": deepspeed,
    "srun": srun,
    "sbatch": sbatch,
    "mpiexec": mpiexec,
    "make": make,
    "pip": pip,
    "eval": script,
    "jq": jq,
    "tensorboard": tensorboard,
    "source": source,
}
