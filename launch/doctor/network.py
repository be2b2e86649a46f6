"""Host name, interfaces and InfiniBand: where first contacts, gloo and NCCL will go."""

from __future__ import annotations

import fcntl
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from distmoe.launch.doctor.finding import Finding, failed, passed, skipped, warned
from distmoe.launch.doctor.situation import Check, Situation

CLASS_NET = Path("/sys/class/net")
INFINIBAND = Path("/sys/class/infiniband")
# Linux: the address and the flags of an interface.
SIOCGIFADDR, SIOCGIFFLAGS = 0x8915, 0x8913
UP, LOOPBACK = 0x1, 0x8
# By name, as NCCL orders them: InfiniBand first, bridges of containers last.
FIRST, LAST = ("ib",), ("docker", "virbr", "veth")


@dataclass(frozen=True)
class Interface:
    """A network interface that is up and has an IPv4 address."""

    name: str
    address: str
    loopback: bool
    mtu: int


def interfaces() -> list[Interface]:
    """Of this machine, those that are up and have an IPv4 address."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(asked, SIOCGIFADDR, request)
                (flags,) = struct.unpack_from("H", fcntl.ioctl(asked, SIOCGIFFLAGS, request), 16)
            except OSError:
                continue
            if flags & UP:
                mtu = int((CLASS_NET / name / "mtu").read_text())
                address = socket.inet_ntoa(answer[20:24])
                found.append(Interface(name, address, bool(flags & LOOPBACK), mtu))
    return found


def host_name(situation: Situation) -> Finding:
    """gloo listens at the address that the host's own name resolves to, unless told otherwise."""
    name = socket.gethostname()
    chosen = "GLOO_SOCKET_IFNAME" in situation.variables
    several = situation.world > situation.local_world and not chosen
    complain = failed if several else warned
    fix = f"a line for {name} in /etc/hosts, or GLOO_SOCKET_IFNAME=INTERFACE"
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        return complain(f"{name} does not resolve: {error}", fix)
    if address.startswith("127.") and several:
        return complain(f"{name} is {address} to itself, where other machines cannot reach it", fix)
    return passed(f"{name} is {address}")


def gloo_interface(situation: Situation) -> Finding:
    """That gloo takes by itself: the one with the address of the host name."""
    chosen = situation.variables.get("GLOO_SOCKET_IFNAME")
    if chosen:
        return passed(f"{chosen}, by GLOO_SOCKET_IFNAME")
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return warned("loopback, as the host name does not resolve", "GLOO_SOCKET_IFNAME=INTERFACE")
    for found in interfaces():
        if found.address == address:
            return passed(f"{_described(found)}, by the host name")
    return passed(f"{address}, by the host name; no interface has just this address")


def nccl_interface(situation: Situation) -> Finding:
    """That NCCL takes by itself for first contacts; rows go by InfiniBand, where it finds one."""
    chosen = situation.variables.get("NCCL_SOCKET_IFNAME")
    if chosen:
        return passed(f"{chosen}, by NCCL_SOCKET_IFNAME")
    found = sorted(interfaces(), key=_nccl_order)
    if not found:
        return warned("no interface is up", "ip link set INTERFACE up")
    several = [one for one in found if not one.loopback and not one.name.startswith(LAST)]
    if len(several) > 1 and situation.world > situation.local_world:
        names = ", ".join(map(_described, several))
        return warned(f"one of {names}", f"NCCL_SOCKET_IFNAME={several[0].name} makes it sure")
    return passed(_described(found[0]))


def _nccl_order(found: Interface) -> tuple[bool, bool, bool]:
    return found.loopback, found.name.startswith(LAST), not found.name.startswith(FIRST)


def _described(found: Interface) -> str:
    return f"{found.name} ({found.address}, MTU {found.mtu:,})"


def infiniband(situation: Situation) -> Finding:
    """Ports of the adapters, and their rates."""
    ports = sorted(INFINIBAND.glob("*/ports/*"))
    if not ports:
        return skipped("no InfiniBand or RoCE adapter here")
    active, down = [], []
    for port in ports:
        # "4: ACTIVE" and "400 Gb/sec (4X NDR)".
        state = (port / "state").read_text().split(":")[-1].strip()
        name = f"{port.parts[-3]}:{port.name}"
        if state == "ACTIVE":
            active.append(f"{name} {(port / 'rate').read_text().split('(')[0].strip()}")
        else:
            down.append(f"{name} {state}")
    if not active:
        return failed(
            f"no port is active: {', '.join(down)}", "ibstat; cable, switch, subnet manager"
        )
    if down:
        return warned(
            f"{', '.join(active)}; {', '.join(down)}", "ibstat; NCCL_IB_HCA names those to use"
        )
    return passed(", ".join(active))


CHECKS: dict[str, Check] = {
    "host name": host_name,
    "gloo takes": gloo_interface,
    "NCCL takes": nccl_interface,
    "InfiniBand": infiniband,
}
