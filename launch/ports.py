"""A port for ranks to meet at."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Nobody listens on it now, on any address of this machine."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
