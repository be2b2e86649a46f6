"""The files that may make the host wait for a device, each for a reason; no others."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "distmoe"
ROOMS = ("comm", "kernels", "model", "moe", "routing")
WAITS = re.compile(
    r"\.(item|tolist|cpu|numpy)\(\)|\.nonzero\(|torch\.cuda\.synchronize"
    # An array of ordinary host memory is waited for on its way to the device, too.
    r"|torch\.(tensor|as_tensor|from_numpy)\("
)

# One number of a tensor, which Python waits for to make a number or a decision of its own.
NUMBERS = {"int", "bool", "float"}
REDUCTIONS = {
    "all", "amax", "amin", "any", "argmax", "argmin", "count_nonzero", "max", "mean", "min", "norm",
    "prod", "sum",
}  # fmt: skip

MAY_WAIT = {
    "comm/mpi.py": "messages of host memory",
    "comm/threaded.py": "ranks as threads, for tests",
    "kernels/moe_mlp/__init__.py": "ranges on the host, for backends with host loops",
    "kernels/moe_mlp/reference.py": "a specification",
    "model/generate.py": "tokens that are to be printed",
    "moe/host_copy.py": "what is exchanged with other ranks: the one place of the layer",
    "routing/routing.py": "how many pairs there are, for callers that give no bound",
    "routing/rounding/reference.py": "a specification",
}


def waits(text: str) -> bool:
    """Whether a file may wait. Numbers of arrays that are called ``_host`` are not waited for, nor
    those of a file without tensors."""
    if WAITS.search(text):
        return True
    return "torch" in text and any(map(makes_a_number, ast.walk(ast.parse(text))))


def makes_a_number(node: ast.AST) -> bool:
    """``int(x[i])``, ``bool((x > 0).all())``; ``if x.any()``, ``not x.any()``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NUMBERS:
        return any(is_of_tensor(part) for part in node.args)
    if isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert)):
        return is_reduction(node.test)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return is_reduction(node.operand)
    return isinstance(node, ast.BoolOp) and any(map(is_reduction, node.values))


def is_of_tensor(node: ast.expr) -> bool:
    """Whether an element or a reduction of what may be a tensor is part of the expression."""
    if isinstance(node, ast.Compare):
        return any(map(is_of_tensor, (node.left, *node.comparators)))
    if isinstance(node, ast.BinOp):
        return is_of_tensor(node.left) or is_of_tensor(node.right)
    if isinstance(node, ast.Subscript):
        of_dict = isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)
        return not (of_dict or is_on_host(node.value))
    return is_reduction(node)


def is_reduction(node: ast.expr) -> bool:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    return node.func.attr in REDUCTIONS and not is_on_host(node.func.value)


def is_on_host(node: ast.expr) -> bool:
    """By its name, or as the shape of something."""
    if isinstance(node, ast.Subscript):
        return is_on_host(node.value)
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return name.endswith("_host") or name == "shape"


def waiting_files() -> set[str]:
    files = [path for room in ROOMS for path in (PACKAGE / room).resolve().rglob("*.py")]
    roots = {(PACKAGE / room).resolve(): room for room in ROOMS}
    found = set()
    for path in files:
        room = next(root for root in roots if path.is_relative_to(root))
        if waits(path.read_text()):
            found.add(f"{roots[room]}/{path.relative_to(room)}")
    return found


def test_only_these_files_wait() -> None:
    assert waiting_files() == set(MAY_WAIT)


@pytest.mark.parametrize(
    "text",
    [
        "x.item()",
        "counts.tolist()",
        "x.cpu()",
        "mask.nonzero()",
        "torch.tensor(2)",
        "int(x[0])",
        "int(x.sum())",
        "float(x[1:].max() + 1)",
        "bool((x > 0).all())",
        "if x[0] == y.sum() or x.any():\n    pass",
        "while not mask.all():\n    pass",
    ],
)
def test_a_wait_is_recognised(text: str) -> None:
    assert waits(f"import torch\n{text}")


@pytest.mark.parametrize(
    "text",
    ["int(rows_host[0])", "int(x.shape[0])", "int(sizes.rows_P_host[2].sum())", "int(c['BT'])"],
)
def test_what_the_host_has_is_not_waited_for(text: str) -> None:
    assert not waits(f"import torch\n{text}")
