"""What a profile says in lines: the operators that take the most time, and the named ranges."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg

# "layer 3: attention" is attention; "FSDP::all_gather (blocks.0)" is FSDP::all_gather.
OF_A_LAYER = re.compile(r"^layer \d+: ")
OF_A_MODULE = re.compile(r" \(.*\)$")
STEP_MARK = "ProfilerStep#"
# What torch calls all steps together.
ALL_STEPS = "ProfilerStep*"

MS = 1e3
NAME_WIDTH = 60


class Cost(NamedTuple):
    """Milliseconds of the host, and of the device where there is one, in ``calls`` calls."""

    name: str
    host_ms: float
    device_ms: float
    calls: int


def operator_costs(events: Iterable[FunctionEventAvg]) -> list[Cost]:
    """The own time of every operator, without those that it calls; the longest first, by the
    device's time where it has worked."""
    costs = [
        Cost(
            str(event.key),
            event.self_cpu_time_total / MS,
            event.self_device_time_total / MS,
            event.count,
        )
        for event in events
        if event.device_type == DeviceType.CPU and not event.is_user_annotation
    ]
    return sorted(costs, key=lambda cost: (cost.device_ms, cost.host_ms), reverse=True)


def range_costs(events: Iterable[FunctionEventAvg]) -> list[Cost]:
    """The time inside of every named range, summed over layers; the steps, then the longest."""
    host: defaultdict[str, float] = defaultdict(float)
    device: defaultdict[str, float] = defaultdict(float)
    calls: defaultdict[str, int] = defaultdict(int)
    for event in events:
        key = str(event.key)
        if not event.is_user_annotation:
            continue
        name = OF_A_MODULE.sub("", OF_A_LAYER.sub("", key))
        if event.device_type == DeviceType.CPU:
            host[name] += event.cpu_time_total / MS
            calls[name] += event.count
        else:
            device[name] += event.device_time_total / MS
    costs = [Cost(name, host[name], device[name], calls[name]) for name in host]
    return sorted(costs, key=lambda cost: (cost.name == ALL_STEPS, cost.host_ms), reverse=True)


def together(costs: Sequence[Cost]) -> Cost:
    """The sum of costs that do not contain each other."""
    return Cost(
        "all",
        sum(cost.host_ms for cost in costs),
        sum(cost.device_ms for cost in costs),
        sum(cost.calls for cost in costs),
    )


def table(title: str, costs: Sequence[Cost], *, whole: Cost, most: int) -> list[str]:
    """Title, column names, and the first ``most`` of ``costs``; shares are of ``whole``, by the
    device's time where it has worked."""
    on_device = whole.device_ms > 0
    total = whole.device_ms if on_device else whole.host_ms
    heading = f"{'':{NAME_WIDTH}}  {'host ms':>10}"
    heading += f"  {'device ms':>10}" if on_device else ""
    lines = [f"{heading}  {'share':>6}  {'calls':>8}"]
    for cost in costs[:most]:
        share = (cost.device_ms if on_device else cost.host_ms) / max(total, 1e-9)
        line = f"{cost.name[:NAME_WIDTH]:{NAME_WIDTH}}  {cost.host_ms:10.2f}"
        line += f"  {cost.device_ms:10.2f}" if on_device else ""
        lines.append(f"{line}  {share:6.1%}  {cost.calls:8,}")
    return [title, *lines]
