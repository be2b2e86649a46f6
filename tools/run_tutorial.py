"""Type the commands of docs/tutorial.md into an empty folder, in order, and show what they print.

python tools/run_tutorial.py              # with the distmoe that is installed here
python tools/run_tutorial.py --install    # in a new environment, by the page's pip install
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOP / "tests/docs"))

from pages import blocks  # noqa: E402
from shell import lines  # noqa: E402

PAGE = TOP / "docs/tutorial.md"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install", action="store_true", help="first make an environment")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        environment = {**os.environ, "DISTMOE": str(TOP)}
        if arguments.install:
            environment["PATH"] = f"{new_environment(folder)}{os.pathsep}{environment['PATH']}"
            environment.pop("PYTHONPATH", None)
        return run(folder, environment, install=arguments.install)


def new_environment(folder: Path) -> Path:
    """The programs of an environment that has nothing but pip."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / ".venv")], check=True)
    return folder / ".venv/bin"


def tutorial(*, install: bool) -> Iterator[str]:
    for block in blocks(PAGE, "sh"):
        for line in lines(block):
            if install or not line.text.startswith("pip "):
                yield line.text


def run(folder: Path, environment: Mapping[str, str], *, install: bool) -> int:
    """All commands until one fails; 1 if one did."""
    begun = time.perf_counter()
    for command in tutorial(install=install):
        print(f"$ {command}", flush=True)
        started = time.perf_counter()
        shell = ["bash", "-e", "-u", "-o", "pipefail", "-c", command]
        code = subprocess.run(shell, cwd=folder, env=environment).returncode
        print(f"[{time.perf_counter() - started:.1f} s]\n", flush=True)
        if code:
            print(f"run_tutorial: error: ended with {code}: {command}", file=sys.stderr)
            return 1
    print(f"all in {time.perf_counter() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
