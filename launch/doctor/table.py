"""All checks, in the order in which they are told: a theme is a file, a check a line in it."""

from __future__ import annotations

from distmoe.launch.doctor import (
    communication,
    devices,
    disk,
    launcher,
    limits,
    network,
    processors,
    run,
    variables,
    versions,
)
from distmoe.launch.doctor.situation import Check

THEMES: dict[str, dict[str, Check]] = {
    "versions": versions.CHECKS,
    "devices": devices.CHECKS,
    "processors": processors.CHECKS,
    "communication": communication.CHECKS,
    "network": network.CHECKS,
    "launcher": launcher.CHECKS,
    "variables": variables.CHECKS,
    "limits": limits.CHECKS,
    "disk": disk.CHECKS,
    "run": run.CHECKS,
}
