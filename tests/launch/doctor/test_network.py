"""Host name, interfaces and InfiniBand."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launch_doctor import NICS, like

from distmoe.launch.doctor import network
from distmoe.launch.doctor.network import Interface
from distmoe.launch.doctor.situation import Situation

Make = Callable[..., Situation]


@pytest.mark.parametrize(
    ("check", "address", "fields", "status", "words"),
    [
        ("host name", "10.0.0.5", {"world": 2}, "pass", "is 10.0.0.5"),
        ("host name", "127.0.1.1", {}, "pass", "is 127.0.1.1"),
        ("host name", "127.0.1.1", {"world": 2}, "fail", "other machines cannot reach it"),
        ("host name", None, {}, "warn", "does not resolve"),
        ("host name", None, {"world": 2}, "fail", "does not resolve"),
        (
            "host name",
            "127.0.1.1",
            {"world": 2, "variables": {"GLOO_SOCKET_IFNAME": "eth0"}},
            "pass",
            "is 127.0.1.1",
        ),
        ("gloo takes", "10.0.0.5", {}, "pass", "eth0 (10.0.0.5, MTU 1,500), by the host name"),
        ("gloo takes", None, {}, "warn", "loopback"),
        (
            "gloo takes",
            None,
            {"variables": {"GLOO_SOCKET_IFNAME": "eth0"}},
            "pass",
            "by GLOO_SOCKET_IFNAME",
        ),
        ("NCCL takes", None, {"world": 2}, "pass", "eth0 (10.0.0.5"),
        (
            "NCCL takes",
            None,
            {"variables": {"NCCL_SOCKET_IFNAME": "^lo"}},
            "pass",
            "^lo, by NCCL_SOCKET_IFNAME",
        ),
    ],
)
def test_network(
    situation: Make,
    monkeypatch: pytest.MonkeyPatch,
    check: str,
    address: str | None,
    fields: dict[str, Any],
    status: str,
    words: str,
) -> None:
    def look_up(name: str) -> str:
        if address is None:
            raise socket.gaierror(-2, "Name or service not known")
        return address

    monkeypatch.setattr(socket, "gethostbyname", look_up)
    monkeypatch.setattr(network, "interfaces", lambda: NICS)
    assert like(network.CHECKS[check](situation(**fields)), status, words)


def test_interfaces_of_several_networks(situation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        network, "interfaces", lambda: [*NICS, Interface("ib0", "10.1.0.5", False, 4092)]
    )
    assert like(network.nccl_interface(situation()), "pass", "ib0 (10.1.0.5, MTU 4,092)")
    assert like(network.nccl_interface(situation(world=2)), "warn", "one of ib0 (10.1.0.5")
    # A bridge of containers is better than nothing but loopback.
    monkeypatch.setattr(network, "interfaces", lambda: NICS[:2])
    assert like(network.nccl_interface(situation()), "pass", "docker0")


def test_interfaces_of_this_machine() -> None:
    (loopback,) = [one for one in network.interfaces() if one.address == "127.0.0.1"]
    assert (loopback.loopback, loopback.mtu > 1000) == (True, True)


@pytest.mark.parametrize(
    ("states", "status", "words"),
    [
        ([], "skip", "no InfiniBand"),
        (["4: ACTIVE"], "pass", "mlx5_0:1 400 Gb/sec"),
        (["4: ACTIVE", "1: DOWN"], "warn", "mlx5_0:1 400 Gb/sec; mlx5_1:1 DOWN"),
        (["1: DOWN"], "fail", "no port is active: mlx5_0:1 DOWN"),
    ],
)
def test_infiniband(
    situation: Make,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    states: list[str],
    status: str,
    words: str,
) -> None:
    monkeypatch.setattr(network, "INFINIBAND", tmp_path)
    for number, state in enumerate(states):
        port = tmp_path / f"mlx5_{number}" / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(state + "\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert like(network.infiniband(situation()), status, words)
