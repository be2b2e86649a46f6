from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _no_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of saves, each of which would wait for the disk several times."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
