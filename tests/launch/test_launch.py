"""`distmoe launch`: what it refuses, and what it would start."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distmoe.launch import cli, slurm

DryRun = Callable[..., list[str]]

WRONG = {
    "launcher": (["ssh"], "LAUNCHER is 'ssh'; it must be one of torchrun, slurm, mpi, deepspeed"),
    "file": (["mpi", "--nodes=2"], "the second argument must be a FILE"),
    "setting": (["mpi", "FILE", "--train.step=5"], "did you mean 'train.steps'?"),
    "nodes": (["mpi", "FILE", "--nodes=0"], "--nodes is '0'; it must be an integer, at least 1"),
    "value": (["mpi", "FILE", "--nodes"], "--nodes needs a value"),
    "batch": (
        ["slurm", "FILE", "--nodes=3", "--ranks-per-node=2"],
        "train.global_batch_size is 16; it must be a multiple of the number of ranks (6)",
    ),
    "other's option": (["mpi", "FILE", "--partition=x"], "unknown option '--partition'"),
    "master": (
        ["torchrun", "FILE", "--nodes=2"],
        "--master is not given; it must be an address of node 0, as --nodes is 2",
    ),
    "master's port": (
        ["torchrun", "FILE", "--nodes=2", "--master=a:0"],
        "--master is 'a:0'; it must be HOST or HOST:PORT",
    ),
    "node rank missing": (
        ["torchrun", "FILE", "--nodes=2", "--master=a"],
        "--node-rank is not given; it must be in 0..1, another on every node",
    ),
    "node rank": (
        ["torchrun", "FILE", "--nodes=2", "--master=a", "--node-rank=2"],
        "--node-rank is 2; it must be in 0..1",
    ),
    "static restarts": (
        ["torchrun", "FILE", "--nodes=2", "--master=a", "--max-restarts=1"],
        "--max-restarts needs --elastic if --nodes is more than 1",
    ),
    "elastic": (["mpi", "FILE", "--elastic"], "--elastic is for torchrun and slurm, not for mpi"),
    "min nodes alone": (["slurm", "FILE", "--min-nodes=1"], "--min-nodes needs --elastic"),
    "min nodes": (
        ["slurm", "FILE", "--nodes=2", "--elastic", "--min-nodes=3"],
        "--min-nodes is 3; it must be at most --nodes (2)",
    ),
    "impossible in between": (
        ["slurm", "FILE", "--nodes=4", "--elastic", "--min-nodes=2"],
        "--min-nodes is 2; 3 nodes are impossible: moe.num_experts is 16",
    ),
    "hostfile": (["mpi", "FILE", "--hostfile=no"], "--hostfile is 'no'; there is no such file"),
    "hosts": (
        ["deepspeed", "FILE", "--nodes=2", "--hosts=a"],
        "--hosts is 'a'; it must name as many hosts as --nodes (2)",
    ),
    "grace": (["slurm", "FILE", "--grace=0"], "--grace is '0'; it must be an integer, at least 1"),
}


@pytest.mark.parametrize(("arguments", "expected"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_start_nothing(
    config_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.setattr("os.execvp", lambda *command: pytest.fail("it was started"))
    argv = [str(config_file) if word == "FILE" else word for word in arguments]
    assert cli.main(["launch", *argv]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("distmoe launch: error: ")
    assert expected in output.err
    assert not (config_file.parent / "run").exists()


@pytest.fixture
def dry_run(config_file: Path, capsys: pytest.CaptureFixture[str]) -> DryRun:
    """The lines of `distmoe launch LAUNCHER FILE ... --dry-run`."""

    def run(launcher: str, *options: str) -> list[str]:
        assert cli.main(["launch", launcher, str(config_file), *options, "--dry-run"]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def words(line: str) -> list[str]:
    """A command's words from its Python on."""
    command = shlex.split(line)
    assert command[:1] == ["env"] or "env" in command
    assert "PYTHONSAFEPATH=1" in command
    return command[command.index(sys.executable) + 1 :]


def test_torchrun_on_one_machine(dry_run: DryRun, config_file: Path) -> None:
    (line,) = dry_run("torchrun", "--ranks-per-node=4", "--train.steps", "70", "--resume=never")
    command = words(line)
    assert command[:4] == ["-m", "torch.distributed.run", "--nproc-per-node=4", "--standalone"]
    settings = ["--train.steps", "70", "--checkpoint.resume", "never"]
    assert command[command.index("distmoe") - 1 :] == [
        *("-m", "distmoe", "train", str(config_file)),
        *settings,
    ]
    assert any("SIGUSR1" in word for word in command)


def test_torchrun_meets_statically_unless_it_is_elastic(dry_run: DryRun) -> None:
    options = ["--nodes=2", "--ranks-per-node=2", "--master=head:77"]
    lines = dry_run("torchrun", *options)
    assert lines[0::2] == ["# on node 0", "# on node 1"]
    for node, line in enumerate(lines[1::2]):
        assert {f"--node-rank={node}", "--master-addr=head", "--master-port=77"} <= set(words(line))
        assert "--max-restarts=0" in line
        assert "c10d" not in line
    assert dry_run("torchrun", *options, "--node-rank=1") == [lines[3]]
    (line,) = dry_run("torchrun", *options, "--elastic", "--launcher-args=--tee 3")
    elastic = {"--nnodes=1:2", "--rdzv-backend=c10d", "--rdzv-endpoint=head:77", "--tee"}
    assert elastic <= set(words(line))
    assert "--max-restarts=3" in line
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in line


def test_elastic_runs_have_as_few_nodes_as_the_mesh_allows(dry_run: DryRun) -> None:
    """Of 4, 3, ... nodes with a rank each: 16 sequences are no multiple of 3 ranks; with two ranks
    of experts on one node each there must be two."""
    options = ["--ranks-per-node=1", "--master=head", "--elastic"]
    assert "--nnodes=4:4" in dry_run("torchrun", "--nodes=4", *options)[0]
    assert "--nnodes=1:2" in dry_run("torchrun", "--nodes=2", *options)[0]
    ep = ["--parallel.ep=2", "--moe.rounding.tile=8"]
    assert "--nnodes=2:2" in dry_run("torchrun", "--nodes=2", *options, *ep)[0]


@pytest.mark.parametrize(
    ("version", "per_node"),
    [("mpirun (Open MPI) 5.0.3", ["--map-by", "ppr:2:node"]), ("HYDRA build", ["-ppn", "2"])],
)
def test_mpi_speaks_as_its_mpiexec_does(
    dry_run: DryRun,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    per_node: list[str],
) -> None:
    program = tmp_path / "mpiexec"
    program.write_text(f"#!/bin/sh\necho '{version}'\n")
    program.chmod(0o755)
    monkeypatch.setattr("distmoe.launch.mpi.PYTHON", str(tmp_path / "python"))
    options = ["--nodes=2", "--ranks-per-node=2", "--hostfile", str(config_file)]
    (line,) = dry_run("mpi", *options)
    command = shlex.split(line)
    hosts = ["--hostfile", str(config_file)]
    assert command[:8] == [str(program), "-n", "4", *per_node, *hosts, "env"]
    assert command[-4:] == ["-m", "distmoe", "train", str(config_file)]


def test_deepspeed_by_ssh_and_without(dry_run: DryRun, config_file: Path) -> None:
    options = ["--nodes=2", "--ranks-per-node=2", "--hosts=a,b"]
    *file, line = dry_run("deepspeed", *options)
    assert file[1:-1] == ["a slots=2", "b slots=2"]
    hostfile = config_file.parent / "run/hostfile"
    assert words(line) == [
        *("-m", "deepspeed.launcher.runner", "--num_accelerators=2"),
        *(f"--hostfile={hostfile}", "--num_nodes=2", "--no_local_rank", "--module"),
        *("distmoe", "train", str(config_file)),
    ]
    line = dry_run("deepspeed", *options, "--node-rank=1", "--master=c:5")[-1]
    without = {"--no_ssh", "--node_rank=1", "--master_addr=c", "--master_port=5"}
    assert without <= set(words(line))
    assert "--hostfile" not in dry_run("deepspeed", "--run.device=cpu")[0]


def test_slurm_fills_the_template_in(dry_run: DryRun, config_file: Path, tmp_path: Path) -> None:
    options = ["--nodes=4", "--ranks-per-node=2", "--partition=gpu", "--time=1:00:00"]
    options += ["--run.name=it's", "--grace=300", "--launcher-args=--qos=high --hold"]
    lines = dry_run("slurm", *options)
    folder = config_file.parent / "run/slurm"
    assert shlex.split(lines[-1]) == ["sbatch", "--qos=high", "--hold", f"{folder}/train.sbatch"]
    script = "\n".join(lines[2:-2]) + "\n"
    for directive in (
        "--nodes=4",
        """--job-name='it'"'"'s'""",
        "--signal=B:USR1@300",
        f"--output={folder}/%x-%j.out",
        "--partition=gpu",
        "--time=1:00:00",
    ):
        assert f"\n#SBATCH {directive}\n" in script
    assert {"RANKS_PER_NODE=2", "MIN_NODES=", "GRACE_S=300"} <= set(lines)
    assert "\n#SBATCH --gpus-per-node" not in script
    assert "\n#SBATCH --no-kill" not in script
    path = tmp_path / "train.sbatch"
    path.write_text(script)
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


def test_slurm_of_gpus_and_elastic(dry_run: DryRun) -> None:
    lines = dry_run("slurm", "--nodes=2", "--ranks-per-node=8", "--run.device=cuda", "--elastic")
    assert "#SBATCH --gpus-per-node=8" in lines
    assert "#SBATCH --no-kill" in lines
    assert "MIN_NODES=1" in lines


def test_a_template_without_a_variable_is_refused() -> None:
    with pytest.raises(AssertionError, match="GRACE= is in 0 lines"):
        slurm.render(slurm.TEMPLATE.read_text(), {}, {"GRACE": "1"})


def test_launch_writes_its_files_and_becomes_the_launcher(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, ...]] = []
    monkeypatch.setattr("os.execvp", lambda program, command: started.append(command))
    monkeypatch.setattr("shutil.which", lambda program: f"/usr/bin/{program}")
    cli.main(["launch", "slurm", str(config_file), "--nodes=2", "--ranks-per-node=1"])
    script = config_file.parent / "run/slurm/train.sbatch"
    assert started == [("sbatch", str(script))]
    assert f"CONFIG=({config_file})" in script.read_text()
    assert "run/slurm/distmoe-JOB.out" in capsys.readouterr().out


def test_a_missing_program_is_named(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda program: None)
    assert cli.main(["launch", "slurm", str(config_file)]) == 2
    assert "there is no sbatch here; --dry-run needs none" in capsys.readouterr().err


def test_help_names_the_options_of_every_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--ranks-per-node", "--node-rank", "--partition", "--hostfile", "--hosts"):
        assert option in text
