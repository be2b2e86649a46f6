"""Whatever a user can pick by name is there, or says which extra to install."""

import pytest

from distmoe import registry
from distmoe.convert.architecture import Architecture
from distmoe.kernels.moe_mlp.tiles import TileSpace

ENTRIES = [
    pytest.param(table, name, id=f"{table.kind}: {name}")
    for table in vars(registry).values()
    if isinstance(table, registry.Registry)
    for name in table
]


@pytest.mark.parametrize(("table", "name"), ENTRIES)
def test_entry_can_be_loaded(table: registry.Registry, name: str) -> None:
    try:
        found = table.load(name)
        assert callable(found) or isinstance(found, Architecture | TileSpace)
    except ImportError as error:
        if "distmoe[" not in str(error):
            raise


def test_all_tables_are_found() -> None:
    assert len({entry.values[0].kind for entry in ENTRIES}) >= 7


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown router 'x'; known: .*sigmoid_topk, softmax_topk"):
        registry.ROUTERS.load("x")
