"""Versions against what the package allows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from launch_doctor import like

from distmoe.launch.doctor import versions
from distmoe.launch.doctor.situation import Situation

Make = Callable[..., Situation]


@pytest.mark.parametrize(
    ("check", "here", "status", "words"),
    [
        ("torch", "2.13.0", "pass", "2.13.0; allowed >=2.11"),
        ("torch", "2.10.1+cu130", "fail", "2.10.1+cu130; allowed >=2.11"),
        ("torch", None, "fail", "not installed"),
        ("deepspeed", "0.19.8", "pass", "allowed ==0.19.8"),
        ("deepspeed", "0.20.0", "warn", "0.20.0; allowed ==0.19.8"),
        ("deepspeed", None, "skip", "pip install 'distmoe[deepspeed]'"),
        ("numpy", "2.0.0", "pass", "; tests ran with "),
    ],
)
def test_versions(
    situation: Make,
    monkeypatch: pytest.MonkeyPatch,
    check: str,
    here: str | None,
    status: str,
    words: str,
) -> None:
    def version(package: str) -> str:
        if here is None:
            raise versions.PackageNotFoundError(package)
        return here

    monkeypatch.setattr(versions, "version", version)
    assert like(versions.CHECKS[check](situation()), status, words)


def test_python(situation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert like(versions.python(situation()), "pass", "allowed >=3.11")
    monkeypatch.setattr(versions.platform, "python_version", lambda: "3.10.4")
    assert like(versions.python(situation()), "fail", "3.10.4; distmoe needs >=3.11")
