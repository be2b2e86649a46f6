"""The scripts that carry peers to a machine without a network."""

import os
import subprocess
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from shutil import which

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def script(name: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(TOOLS / name), *options],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


@pytest.mark.processes
def test_dry_run_says_what_would_be_downloaded_and_writes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "carry"
    done = script("pack_peers.sh", "--dry-run", str(folder))
    assert done.returncode == 0
    for package in ("sonic-moe==0.1.2.post1", "quack-kernels==0.3.11", "liger-kernel==0.8.5"):
        assert package in done.stdout
    # What training needs and torch does not bring, in the version that the tests run with.
    for package in ("tyro", "tomli-w"):
        assert f"{package}=={version(package)}" in done.stdout
    assert not folder.exists()


@pytest.mark.processes
@pytest.mark.parametrize("name", ["pack_peers.sh", "unpack_peers.sh"])
def test_wrong_option_exits_with_2_and_help_with_0(name: str) -> None:
    assert script(name, "--fast").returncode == 2
    done = script(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert name in done.stdout


@pytest.mark.processes
def test_unpacked_packages_are_on_the_path(tmp_path: Path) -> None:
    folder, site = tmp_path / "carry", tmp_path / "site"
    folder.mkdir()
    with zipfile.ZipFile(folder / "peer-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer/__init__.py", "")
    module = tmp_path / "cutlass.py"
    module.write_text("")
    with tarfile.open(folder / "cutlass_dsl_libs_base.tar.xz", "w:xz") as archive:
        archive.add(module, "nvidia_cutlass_dsl/python_packages/cutlass.py")
    done = script("unpack_peers.sh", str(folder), str(site))
    assert done.returncode == 0, done.stderr
    code = f"{done.stdout}\npython3 -c 'import peer, cutlass'"
    subprocess.run(["bash", "-euc", code], check=True, timeout=60)
    (site / "peer/__init__.py").write_text("kept = True")
    script("unpack_peers.sh", str(folder), str(site))
    assert "kept" in (site / "peer/__init__.py").read_text()


# In the place of pip: a wheel with one module.
PYTHON = """#!/usr/bin/env bash
[[ "$*" == "-m pip download"* ]] || exec python3 "$@"
while [[ $1 != --dest ]]; do shift; done
cp "$WHEEL" "$2/$(printf %s "${*:3}" | cksum | cut -d ' ' -f 1)-py3-none-any.whl"
"""


@pytest.mark.processes
@pytest.mark.skipif(which("xz") is None, reason="needs xz")
def test_what_is_packed_can_be_unpacked(tmp_path: Path) -> None:
    python, wheel, folder = tmp_path / "python", tmp_path / "one.whl", tmp_path / "carry"
    python.write_text(PYTHON)
    python.chmod(0o755)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("peer.py", "")
    done = script("pack_peers.sh", str(folder), PYTHON=str(python), WHEEL=str(wheel))
    assert done.returncode == 0, done.stderr
    packed = sum(path.stat().st_size for path in folder.iterdir())
    assert f"{packed} bytes, at most 58720256" in done.stderr
    with tarfile.open(folder / "cutlass_dsl_libs_base.tar.xz", "r:xz") as archive:
        assert "./peer.py" in archive.getnames()


@pytest.mark.processes
def test_nothing_packed_exits_with_2(tmp_path: Path) -> None:
    done = script("unpack_peers.sh", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "make it with tools/pack_peers.sh" in done.stderr
