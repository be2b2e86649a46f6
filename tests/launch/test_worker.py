"""How a rank ends when its peers do."""

import subprocess
import sys
from pathlib import Path

import pytest

from distmoe.launch.ports import free_port
from distmoe.launch.worker import in_one_line

pytestmark = pytest.mark.processes


def test_a_lost_store_is_no_page_of_c_plus_plus() -> None:
    port = free_port()
    program = Path(__file__).with_name("lost_store.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), str(port)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert said == [f"rank {rank}: ValueError: the end of rank {rank}\n" for rank in range(2)]


def test_a_lost_peer_without_small_talk() -> None:
    said = "[pair.cc:537] Read error [10.0.0.2]:29: Connection reset by peer. This is typically a"
    assert in_one_line(RuntimeError(f"{said}\nmore")) == (
        "lost a peer: RuntimeError: [pair.cc:537] Read error [10.0.0.2]:29: "
        "Connection reset by peer."
    )
