"""A room imports only rooms to its left, and one file reads the environment."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "distmoe"
ORDER = (
    ("registry", "arguments", "config"),
    ("kernels",),
    ("mesh", "runtime", "named_range", "comm"),
    ("routing",),
    ("moe",),
    ("model",),
    ("data",),
    ("engines",),
    ("checkpoint",),
    ("convert",),
    ("metrics",),
    ("planner",),
    ("bench",),
    ("train",),
    ("launch",),
)
PLACE = {room: place for place, rooms in enumerate(ORDER) for room in rooms}
# kernels and launch are symlinks, which a recursive glob does not enter.
ROOMS = [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]
FILES = sorted(path for room in ROOMS for path in room.rglob("*.py"))
FILES += sorted(path for path in PACKAGE.glob("*.py") if not path.name.startswith("__"))
READS_ENVIRONMENT = PACKAGE / "launch/env.py"
READING = re.compile(r"os\.(environ|getenv|putenv)|import environ\b")
KERNELS_MAY_IMPORT = {"torch", "triton", "sonicmoe", *sys.stdlib_module_names}


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_file_keeps_to_its_room(file: Path) -> None:
    room = room_of(file)
    for name in imports(file):
        top, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        assert top not in ("kernels", "launch"), f"{name}: import distmoe.{name}"
        if top == "distmoe" and other in PLACE:
            allowed = PLACE[other] <= PLACE[room] and (room, other) != ("kernels", "config")
            assert allowed, f"{room} imports {name}, which is to its right"
        elif room == "kernels":
            assert top in KERNELS_MAY_IMPORT, f"kernels imports {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_environment_is_read_in_one_file(file: Path) -> None:
    reads = READING.search(file.read_text())
    assert not reads or file == READS_ENVIRONMENT


def test_every_room_has_a_place_and_files_are_found() -> None:
    assert {room_of(file) for file in FILES} <= set(PLACE)
    assert READS_ENVIRONMENT in FILES
    assert PACKAGE / "kernels/moe_mlp/__init__.py" in FILES
