"""Answers of probes and the look of findings, for tests of the doctor's checks."""

from __future__ import annotations

from typing import Any

from distmoe.launch.doctor.finding import Finding
from distmoe.launch.doctor.network import Interface
from distmoe.launch.doctor.probes import ProbeError

DEVICE = {"name": "NVIDIA H200", "capability": [9, 0], "bytes": 140 << 30}
NICS = [
    Interface("lo", "127.0.0.1", True, 65536),
    Interface("docker0", "172.17.0.1", False, 1500),
    Interface("eth0", "10.0.0.5", False, 1500),
]


class Answers:
    """Of probes, by name; a text is an error."""

    def __init__(self, **answers: Any) -> None:
        self.answers = {"torch": {"cuda": "13.0", "devices": [], "nccl": "2.28.9"}, **answers}

    def answer(self, name: str) -> dict[str, Any]:
        answer = self.answers.get(name, "no answer in 11 s")
        if isinstance(answer, str):
            raise ProbeError(answer)
        return answer


def torch_with(*devices: dict[str, Any], **facts: Any) -> Answers:
    """What the probe says of a machine with ``devices``."""
    return Answers(torch={"cuda": "13.0", "devices": list(devices), "nccl": "2.28.9", **facts})


def like(finding: Finding, status: str, words: str) -> bool:
    """With the whole of it where it is not."""
    assert (finding.status, words in finding.seen) == (status, True), finding
    assert bool(finding.fix) is (status in ("warn", "fail"))
    return True
