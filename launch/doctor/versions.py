"""Python and packages, against what the package allows."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import distmoe
from distmoe.launch.doctor.finding import Finding, failed, passed, skipped, warned
from distmoe.launch.doctor.situation import Check, Situation

OWN = "distmoe"
NOT_INSTALLED = "distmoe itself is not installed: what it allows is not known"
# Versions that the tests ran with; only beside a checkout.
TESTED = Path(distmoe.__file__).parents[1] / "constraints.txt"

# Without them there is no run.
REQUIRED = ("torch", "numpy", "tokenizers", "tensorboard", "tyro", "tomli-w")
# Package -> what it is for, and the extra of pyproject.toml that brings it.
OPTIONAL = {
    "triton": ("the kernels of GPUs", ""),
    "deepspeed": ("parallel.engine 'deepspeed'", "deepspeed"),
    "mpi4py": ("mpiexec and the exchange 'mpi'", "mpi"),
    "transformers": ("models of Hugging Face", "hf"),
    "safetensors": ("models of Hugging Face", "hf"),
    "pyarrow": ("Parquet", "parquet"),
    "matplotlib": ("pictures of reports", "report"),
    "nvidia-ml-py": ("energy and clocks of GPUs", "nvml"),
    "wandb": ("metrics.wandb", "wandb"),
    "sonic-moe": ("moe.kernel 'sonicmoe'", "sonicmoe"),
}


def python(situation: Situation) -> Finding:
    try:
        allowed = metadata(OWN)["Requires-Python"]
    except PackageNotFoundError:
        return skipped(f"Python {platform.python_version()}; {NOT_INSTALLED}")
    here = platform.python_version()
    if not SpecifierSet(allowed).contains(here, prereleases=True):
        return failed(f"{here}; distmoe needs {allowed}", f"make the environment with {allowed}")
    return passed(f"{here}; allowed {allowed}")


def required(situation: Situation, *, package: str) -> Finding:
    """A package without which nothing runs."""
    try:
        here = version(package)
    except PackageNotFoundError:
        return failed("not installed", "pip install distmoe")
    return _compared(package, here, failed)


def optional(situation: Situation, *, package: str) -> Finding:
    """A package without which something cannot be used."""
    purpose, extra = OPTIONAL[package]
    advice = f"pip install 'distmoe[{extra}]'" if extra else f"pip install {package}"
    try:
        here = version(package)
    except PackageNotFoundError:
        return skipped(f"not installed; for {purpose}: {advice}")
    return _compared(package, here, warned)


def _compared(package: str, here: str, complain: Callable[[str, str], Finding]) -> Finding:
    try:
        allowed = allowed_versions(package)
    except PackageNotFoundError:
        return skipped(f"{here}; {NOT_INSTALLED}")
    tested = tested_version(package)
    # Without the build, as in 2.13.0+cu130.
    beside = f"; tests ran with {tested}" if tested and tested != Version(here).public else ""
    if not allowed.contains(here, prereleases=True):
        return complain(f"{here}; allowed {allowed}", f"pip install '{package}{allowed}'")
    return passed(f"{here}{f'; allowed {allowed}' if str(allowed) else ''}{beside}")


def allowed_versions(package: str) -> SpecifierSet:
    """What pyproject.toml allows, with its extras; PackageNotFoundError if distmoe is not
    installed."""
    found = SpecifierSet()
    for line in requires(OWN) or ():
        requirement = Requirement(line)
        if canonicalize_name(requirement.name) == canonicalize_name(package):
            found &= requirement.specifier
    return found


def tested_version(package: str) -> str:
    """That of constraints.txt; empty without the file."""
    lines = TESTED.read_text().splitlines() if TESTED.is_file() else []
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    names = {canonicalize_name(name): pin for name, pin in pins.items()}
    return names.get(canonicalize_name(package), "")


CHECKS: dict[str, Check] = {
    "python": python,
    **{package: partial(required, package=package) for package in REQUIRED},
    **{package: partial(optional, package=package) for package in OPTIONAL},
}
