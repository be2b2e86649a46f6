"""Runs checks side by side, and waits for none of them longer than allowed."""

from __future__ import annotations

import queue
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from distmoe.config import ConfigError
from distmoe.launch.doctor.finding import Finding, failed, skipped, warned
from distmoe.launch.doctor.probes import ProbeError
from distmoe.launch.doctor.situation import Check, NoRunError, Situation
from distmoe.launch.worker import in_one_line
from distmoe.metrics.nvml import NvmlError


@dataclass(frozen=True)
class Result:
    theme: str
    check: str
    finding: Finding


def examine(
    situation: Situation, themes: Mapping[str, Mapping[str, Check]], *, seconds: float
) -> Iterator[Result]:
    """Results in the order of ``themes``, each as soon as it is there; a check that has none after
    ``seconds`` has failed, and is left behind."""
    deadline = time.monotonic() + seconds
    answers = [
        (theme, name, _begin(check, situation))
        for theme, checks in themes.items()
        for name, check in checks.items()
    ]
    for theme, name, answer in answers:
        try:
            finding = answer.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            finding = failed(
                f"no answer in {seconds:g} s", "what it looks at hangs: a file system, a driver"
            )
        yield Result(theme, name, finding)


def _begin(check: Check, situation: Situation) -> queue.SimpleQueue[Finding]:
    """The check in a thread, which nobody has to wait for at the end of the process."""
    answer: queue.SimpleQueue[Finding] = queue.SimpleQueue()
    thread = threading.Thread(target=lambda: answer.put(finding_of(check, situation)), daemon=True)
    thread.start()
    return answer


def finding_of(check: Check, situation: Situation) -> Finding:
    """Of one check, however that ends."""
    try:
        return check(situation)
    except (NoRunError, NvmlError, ProbeError) as error:
        return skipped(str(error))
    # A setting that a check cannot make sense of.
    except ConfigError as error:
        return skipped(f"{error.problems[0]}; see `settings`")
    except subprocess.TimeoutExpired as error:
        return warned(f"{error.cmd[0]} has not answered in {error.timeout:g} s", "run it by hand")
    # The other checks are of use whatever has happened to this one.
    except Exception as error:
        return failed(f"the check broke: {in_one_line(error)}", "look at what it names")
