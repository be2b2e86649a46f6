"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """``FAIL``: a run will not start, or is wrong; ``WARN``: it will be slower than it could be, or
    break later; ``SKIP``: the check cannot be made here."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True)
class Finding:
    """``seen``: in one line; of a skipped check: why. ``fix``: what to do, in one line."""

    status: Status
    seen: str
    fix: str = ""


def passed(seen: str) -> Finding:
    return Finding(Status.PASS, seen)


def warned(seen: str, fix: str) -> Finding:
    return Finding(Status.WARN, seen, fix)


def failed(seen: str, fix: str) -> Finding:
    return Finding(Status.FAIL, seen, fix)


def skipped(why: str) -> Finding:
    return Finding(Status.SKIP, why)
