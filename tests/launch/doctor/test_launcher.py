"""What launchers and environment variables say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from launch_doctor import DEVICE, NICS, like, torch_with

from distmoe.config import Config, RankInfo, RunConfig
from distmoe.launch.doctor import launcher, variables
from distmoe.launch.doctor.situation import Situation

Make = Callable[..., Situation]
SLURM = {"SLURM_JOB_ID": "7"}
STEP = {**SLURM, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}
SLURM_RANKS = RankInfo(rank=1, world=8, local_rank=1, local_world=4, source="slurm")


@pytest.mark.parametrize(
    ("check", "fields", "status", "words"),
    [
        ("ranks", {}, "pass", "no launcher"),
        ("ranks", {"ranks": SLURM_RANKS}, "pass", "slurm: rank 1 of 8, 4 on this machine"),
        ("ranks", {"launcher_problem": "RANK is 'x'"}, "fail", "RANK is 'x'"),
        ("SLURM step", {}, "skip", "not in a SLURM job"),
        ("SLURM step", {"variables": SLURM}, "pass", "job 7, outside of srun"),
        ("SLURM step", {"variables": {**STEP, "SLURM_PROCID": "7"}}, "pass", "8 tasks on 2 nodes"),
        ("SLURM step", {"variables": {**STEP, "SLURM_PROCID": "8"}}, "fail", "SLURM_PROCID is '8'"),
        ("SLURM GPUs", {"variables": SLURM}, "skip", "the job has no GPUs here"),
        (
            "SLURM GPUs",
            {"variables": {**STEP, "SLURM_GPUS_ON_NODE": "4"}, "ranks": SLURM_RANKS},
            "pass",
            "4 tasks and 4 GPUs",
        ),
        (
            "SLURM GPUs",
            {"variables": STEP, "ranks": SLURM_RANKS, "probes": torch_with(DEVICE)},
            "fail",
            "4 tasks and 1 GPUs",
        ),
        (
            "SLURM GPUs",
            {"variables": {**SLURM, "SLURM_GPUS_ON_NODE": "8"}},
            "warn",
            "1 tasks and 8 GPUs",
        ),
        (
            "SLURM GPUs",
            {
                "variables": {**SLURM, "SLURM_GPUS_ON_NODE": "8"},
                "ranks": replace(SLURM_RANKS, source="torchrun"),
            },
            "pass",
            "1 tasks and 8 GPUs",
        ),
        (
            "SLURM GPUs",
            {
                "variables": {**STEP, "SLURM_GPUS_PER_TASK": "1", "SLURM_GPUS_ON_NODE": "4"},
                "ranks": SLURM_RANKS,
                "probes": torch_with(DEVICE),
            },
            "fail",
            "SLURM_GPUS_PER_TASK is 1: a rank sees 1 GPUs, and must see those of all 4 ranks",
        ),
        # With --gpu-bind=none.
        (
            "SLURM GPUs",
            {
                "variables": {**STEP, "SLURM_GPUS_PER_TASK": "1", "SLURM_GPUS_ON_NODE": "4"},
                "ranks": SLURM_RANKS,
                "probes": torch_with(*[DEVICE] * 4),
            },
            "pass",
            "4 tasks and 4 GPUs",
        ),
        # torchrun in one task.
        (
            "SLURM GPUs",
            {
                "variables": {**STEP, "SLURM_GPUS_PER_TASK": "4", "SLURM_GPUS_ON_NODE": "4"},
                "ranks": replace(SLURM_RANKS, source="torchrun"),
            },
            "pass",
            "1 tasks and 4 GPUs",
        ),
        # A task a node.
        (
            "SLURM GPUs",
            {
                "variables": {**STEP, "SLURM_GPUS_PER_TASK": "1", "SLURM_GPUS_ON_NODE": "1"},
                "ranks": replace(SLURM_RANKS, local_rank=0, local_world=1),
                "probes": torch_with(DEVICE),
            },
            "pass",
            "1 tasks and 1 GPUs",
        ),
        ("SLURM cores", {"variables": STEP}, "pass", "not set"),
        ("SLURM cores", {"variables": {**STEP, "SLURM_CPUS_PER_TASK": "9"}}, "pass", "9 a task"),
        (
            "SLURM cores",
            {"variables": {**SLURM, "SLURM_CPUS_PER_TASK": "9"}},
            "warn",
            "of which srun knows nothing",
        ),
    ],
)
def test_launcher(
    situation: Make, check: str, fields: dict[str, Any], status: str, words: str
) -> None:
    assert like(launcher.CHECKS[check](situation(**fields)), status, words)


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        ("JobId=7 Requeue=1 Restarts=0", "pass", "may be queued again"),
        ("JobId=7 Requeue=0 Restarts=0", "warn", "not queued again"),
        ("", "skip", "scontrol does not tell: Invalid job id"),
    ],
)
def test_requeue(
    situation: Make, monkeypatch: pytest.MonkeyPatch, text: str, status: str, words: str
) -> None:
    told = SimpleNamespace(stdout=text, stderr="Invalid job id")
    monkeypatch.setattr(launcher.subprocess, "run", lambda *args, **options: told)
    assert like(launcher.slurm_requeue(situation(variables=SLURM)), status, words)


@pytest.mark.parametrize(
    ("check", "fields", "status", "words"),
    [
        ("set", {"variables": {"HOME": "/"}}, "pass", "none of NCCL_*"),
        ("set", {"variables": {"NCCL_DEBUG": "INFO", "A": "1"}}, "pass", "NCCL_DEBUG=INFO"),
        ("hurtful", {"variables": {"NCCL_DEBUG": "INFO"}}, "pass", "none of those"),
        ("hurtful", {"variables": {"CUDA_LAUNCH_BLOCKING": "1"}}, "warn", "nothing overlaps"),
        ("hurtful", {"variables": {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}}, "warn", "share a queue"),
        ("hurtful", {"variables": {"TORCH_DISTRIBUTED_DEBUG": "detail"}}, "warn", "checked by"),
        ("CUDA_VISIBLE_DEVICES", {}, "pass", "not set"),
        ("CUDA_VISIBLE_DEVICES", {"variables": {"CUDA_VISIBLE_DEVICES": "-1"}}, "warn", "hides"),
        (
            "CUDA_VISIBLE_DEVICES",
            {
                "variables": {"CUDA_VISIBLE_DEVICES": ""},
                "config": Config(run=RunConfig(device="cuda")),
            },
            "fail",
            "'' hides all GPUs, and run.device is 'cuda'",
        ),
        (
            "CUDA_VISIBLE_DEVICES",
            {"variables": {"CUDA_VISIBLE_DEVICES": "0"}, "local_world": 4},
            "warn",
            "1 GPUs for 4 ranks",
        ),
        ("NCCL_SOCKET_IFNAME", {}, "skip", "not set"),
        ("NCCL_SOCKET_IFNAME", {"variables": {"NCCL_SOCKET_IFNAME": "eth"}}, "pass", "eth"),
        ("NCCL_SOCKET_IFNAME", {"variables": {"NCCL_SOCKET_IFNAME": "^lo"}}, "pass", "all but lo"),
        ("NCCL_SOCKET_IFNAME", {"variables": {"NCCL_SOCKET_IFNAME": "=eth"}}, "fail", "'eth' is"),
        ("GLOO_SOCKET_IFNAME", {"variables": {"GLOO_SOCKET_IFNAME": "eth"}}, "fail", "not here"),
        ("GLOO_SOCKET_IFNAME", {"variables": {"GLOO_SOCKET_IFNAME": "eth0"}}, "pass", "eth0"),
    ],
)
def test_variables(
    situation: Make,
    monkeypatch: pytest.MonkeyPatch,
    check: str,
    fields: dict[str, Any],
    status: str,
    words: str,
) -> None:
    monkeypatch.setattr(variables, "interfaces", lambda: NICS)
    assert like(variables.CHECKS[check](situation(**fields)), status, words)
