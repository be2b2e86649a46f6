"""What a machine can do, as `distmoe doctor comm` measures it or a table of known ones says."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from distmoe.planner.roofline import DEVICE_SPEEDS, DeviceSpeed

LINKS = ("own", "node", "remote")
DTYPES = ("bf16", "fp32")
COLLECTIVES = ("gather", "reduce")
RATES = {
    "gemm_flops": DTYPES,
    "dense_flops": DTYPES,
    "attention_flops": DTYPES,
    "collective_share": COLLECTIVES,
}
"""Tables of a file -> the names that they may have."""
OPTIONAL: dict[str, Any] = {
    "origin": {},
    "dense_flops": {},
    "attention_flops": {},
    "collective_share": {},
    "memory_bytes": 0,
    "ranks_per_node": 0,
}
H100, H200, B200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA B200"


class ProfileError(ValueError):
    """A profile cannot be read; the message names file, key, value and what is allowed."""


@dataclass(frozen=True)
class Link:
    """A message of n bytes takes ``latency_s`` + n / ``bytes_per_s``, in each direction at once.

    ``shared``: the rate is of one link that all ranks of a node share. Else it is of each rank.
    """

    latency_s: float
    bytes_per_s: float
    shared: bool = False

    def rate_of_a_rank(self, ranks_per_node: int) -> float:
        """While all ranks of the node send."""
        return self.bytes_per_s / (ranks_per_node if self.shared else 1)

    @staticmethod
    def through(small: tuple[int, float], large: tuple[int, float]) -> Link:
        """From the times of two messages, (bytes, seconds). Where noise makes the large one no
        slower, all of its time counts as transfer."""
        seconds = large[1] - small[1]
        if seconds <= 0:
            return Link(small[1], large[0] / large[1])
        rate = (large[0] - small[0]) / seconds
        return Link(max(0.0, small[1] - small[0] / rate), rate)


@dataclass(frozen=True)
class Origin:
    """Where the figures come from: device and date, versions, and words."""

    device: str = ""
    date: str = ""
    note: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """``links`` by class: "own", a copy inside a rank's device (bytes copied, not read + written),
    "node", ranks of one node, "remote", ranks of two nodes. ``gemm_flops``: FLOP/s of the expert
    products by dtype; empty for a known machine, whose are assumed (`expert_rate`), and whose
    ``dense_flops`` are those of large products. ``host_latency_s``: seconds of a launch.

    What only `distmoe plan` needs, and older files do not have: FLOP/s of the products of a block
    (``dense_flops``) and of causal attention (``attention_flops``) by dtype, what "gather" and
    "reduce" of parameters reach over a ring on the links (``collective_share``), bytes of a rank's
    device, ranks on a node; empty or 0: not known.
    """

    links: Mapping[str, Link]
    gemm_flops: Mapping[str, float]
    host_latency_s: float
    origin: Origin = Origin()
    dense_flops: Mapping[str, float] = field(default_factory=dict)
    attention_flops: Mapping[str, float] = field(default_factory=dict)
    collective_share: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: int = 0
    ranks_per_node: int = 0

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Those with a rate of the expert products, measured or assumed."""
        return tuple(self.gemm_flops or self.dense_flops)

    def link(self, name: str) -> Link:
        """The link class; ValueError if it was not measured."""
        if name not in self.links:
            raise ValueError(f"the profile has no link '{name}'; it has {', '.join(self.links)}")
        return self.links[name]


# By the data sheets NVLink 4 has 450 GB/s in each direction, NVLink 5 900, and the NIC 400 Gbit/s;
# that collectives reach 0.8 and 0.85 of it, with 0.5 and 1.5 us for every peer, is assumed. Copies:
# half of the bytes that a large one reads and writes. Memory is what torch reports.
def _preset(device: str, speed: DeviceSpeed, *, nvlink: float, memory_gib: float) -> Profile:
    return Profile(
        links={
            "own": Link(5e-6, speed.bytes_per_s / 2),
            "node": Link(0.5e-6, 0.8 * nvlink),
            "remote": Link(1.5e-6, 0.85 * 50e9),
        },
        gemm_flops={},
        host_latency_s=25e-6,
        origin=Origin(device=device, note="assumed: NVLink in the node, a 400 Gbit/s NIC per GPU"),
        dense_flops={"bf16": speed.flops},
        memory_bytes=int(memory_gib * 2**30),
        ranks_per_node=8,
    )


# Nobody measured a B200 for us: the shares of peak (2,250 TFLOP/s) and of memory rate (7.67 TB/s:
# github.com/pytorch/ao/pull/4002) that the H100 reaches.
_B200 = DeviceSpeed(flops=0.8 * 2250e12, bytes_per_s=0.9 * 7.67e12)

PRESETS = {
    H100: _preset(H100, DEVICE_SPEEDS[H100], nvlink=450e9, memory_gib=79.1),
    H200: _preset(H200, DEVICE_SPEEDS[H200], nvlink=450e9, memory_gib=139.8),
    B200: _preset(B200, _B200, nvlink=900e9, memory_gib=178.3),
}
"""By the name that the driver gives."""


def find_profile(path: str, device_name: str) -> Profile | None:
    """The profile in the file ``path``; for "" the preset of the device, if it has one.
    ProfileError for a file that is wrong."""
    return load_profile(path) if path else PRESETS.get(device_name)


def save_profile(profile: Profile, path: str | Path) -> None:
    """As TOML; `load_profile` reads an equal Profile back."""
    import tomli_w

    Path(path).write_text(tomli_w.dumps(dataclasses.asdict(profile)), encoding="utf-8")


def load_profile(path: str | Path) -> Profile:
    """A profile that `save_profile` wrote, or one by hand; ProfileError for anything else."""
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ProfileError(f"profile '{path}' cannot be read: {error}") from error
    return profile_of(tables, str(path))


def profile_of(tables: Mapping[str, Any], source: str) -> Profile:
    """From what `dataclasses.asdict` made of one; ProfileError names the ``source``."""
    return _Reader(source).profile(tables)


class _Reader:
    """Turns the tables of a file into a Profile, and names the first key that is wrong."""

    def __init__(self, path: str) -> None:
        self._path = path

    def profile(self, tables: Mapping[str, Any]) -> Profile:
        self._check_keys("", tables, tuple(field.name for field in dataclasses.fields(Profile)))
        tables = OPTIONAL | dict(tables)
        links = self._table("links", tables, LINKS)
        if "own" not in links:
            raise self._wrong("links.own", "missing", "be there")
        return Profile(
            links={name: self._link(f"links.{name}", links) for name in links},
            host_latency_s=self._number("host_latency_s", tables),
            origin=self._origin(tables),
            memory_bytes=int(self._number("memory_bytes", tables)),
            ranks_per_node=int(self._number("ranks_per_node", tables)),
            **{name: self._rates(name, tables, known) for name, known in RATES.items()},
        )

    def _rates(
        self, section: str, tables: Mapping[str, Any], known: tuple[str, ...]
    ) -> dict[str, float]:
        table = self._table(section, tables, known)
        return {name: self._number(f"{section}.{name}", table, zero=False) for name in table}

    def _link(self, section: str, links: Mapping[str, Any]) -> Link:
        table = self._table(section, links, tuple(f.name for f in dataclasses.fields(Link)))
        shared = table.get("shared", False)
        if not isinstance(shared, bool):
            raise self._wrong(f"{section}.shared", shared, "be true or false")
        return Link(
            latency_s=self._number(f"{section}.latency_s", table),
            bytes_per_s=self._number(f"{section}.bytes_per_s", table, zero=False),
            shared=shared,
        )

    def _origin(self, tables: Mapping[str, Any]) -> Origin:
        table = self._table("origin", tables, tuple(f.name for f in dataclasses.fields(Origin)))
        texts = {f"origin.{name}": text for name, text in table.items() if name != "versions"}
        if "versions" in table:
            versions = self._table("origin.versions", table)
            texts |= {f"origin.versions.{name}": text for name, text in versions.items()}
        for key, text in texts.items():
            if not isinstance(text, str):
                raise self._wrong(key, text, "be a string")
        return Origin(**table)

    def _table(
        self, key: str, parent: Mapping[str, Any], known: tuple[str, ...] | None = None
    ) -> Mapping[str, Any]:
        """With ``known`` names only, if they are known."""
        table = parent.get(key.rpartition(".")[2], "missing")
        if not isinstance(table, Mapping):
            raise self._wrong(key, table, f"be a table, [{key}]")
        if known is not None:
            self._check_keys(key, table, known)
        return table

    def _number(self, key: str, table: Mapping[str, Any], *, zero: bool = True) -> float:
        """Finite and not negative; 0 only where ``zero`` is allowed."""
        number = table.get(key.rpartition(".")[2], "missing")
        # A bool is an int to isinstance; nan is no number that can be compared.
        if type(number) not in (int, float) or not 0 <= number < inf or not (number or zero):
            allowed = "at least 0" if zero else "greater than 0"
            raise self._wrong(key, number, f"be a number, {allowed}")
        return float(number)

    def _check_keys(self, section: str, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
        for name, value in table.items():
            if name not in known:
                key = f"{section}.{name}" if section else name
                raise ProfileError(
                    f"unknown key '{key}' ({value!r}) in profile '{self._path}'; known: "
                    f"{', '.join(known)}"
                )

    def _wrong(self, key: str, value: object, allowed: str) -> ProfileError:
        return ProfileError(f"{key} is {value!r} in profile '{self._path}'; it must {allowed}")
