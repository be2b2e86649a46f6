"""Tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distmoe.bench.kernels.catalog import BOUND

# Kernels of a profile that are listed.
PROFILED = 20


def print_record(record: dict[str, Any], console: Console) -> None:
    """Everything about one shape and rule."""
    shape, pairs = record["shape"], record["pairs"]
    rule = record["rounding"]
    waste = record["padded_pairs"] / pairs - 1
    sizes = " ".join(f"{letter}={shape[letter]}" for letter in "THIEK")
    console.print(
        f"{shape['name']}  {sizes}, {'top-k' if rule == 'none' else f'rounded by {rule}'}: "
        f"{pairs} pairs, {waste:.1%} padding to tiles of {shape['tile']}"
    )
    if record["checked_tokens"] < shape["T"]:
        console.print(f"checked with {record['checked_tokens']} tokens: more do not fit in fp32")
    console.print(_backend_table(record))
    for name, backend in record["backends"].items():
        if backend["why_not"]:
            console.print(f"{name}: no time. {backend['why_not']}")
        elif backend["wrong"]:
            console.print(f"{name}: WRONG, timed nevertheless. {backend['wrong']}")
    _print_router(record, console)
    if record["pieces"]:
        console.print(_piece_table(record))
    for name, tiles in record["tiles"].items():
        console.print(_tile_table(name, tiles))
        _print_best_tiles(tiles, console)
    for name, kernels in record["profiles"].items():
        console.print(_profile_table(name, kernels))
    console.print()


def print_rounding(records: list[dict[str, Any]], console: Console) -> None:
    """Totals with the router's time, rounded against top-k, for shapes that have both."""
    columns = ("router ms", "experts ms", "total ms", "pairs/s against top-k")
    table = _table("backend", "routing", *columns)
    for record in records:
        plain = _plain(record, records)
        if record["rounding"] == "none" or plain is None:
            continue
        for name in record["backends"]:
            base, total = _total(plain, name), _total(record, name)
            if name == BOUND or base is None or total is None:
                continue
            label = f"{record['shape']['name']} {name}"
            table.add_row(label, "top-k", *_total_cells(plain, name, base), "")
            gain = (record["pairs"] / total) / (plain["pairs"] / base) - 1
            cells = _total_cells(record, name, total)
            table.add_row("", record["rounding"], *cells, f"{gain:+.1%}")
    if table.row_count:
        console.print("forward and backward of router (without the gate's product) and experts")
        console.print(table)


def _plain(record: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any] | None:
    for other in records:
        if other["rounding"] == "none" and other["shape"] == record["shape"]:
            return other
    return None


def _experts_ms(record: dict[str, Any], name: str) -> float | None:
    modes = record["backends"].get(name, {"modes": {}})["modes"]
    if "both" in modes:
        return float(modes["both"]["median_ms"])
    if "forward" in modes and "backward" in modes:
        return float(modes["forward"]["median_ms"] + modes["backward"]["median_ms"])
    return None


def _total(record: dict[str, Any], name: str) -> float | None:
    experts = _experts_ms(record, name)
    return None if experts is None else experts + float(record["router"]["total_ms"])


def _total_cells(record: dict[str, Any], name: str, total: float) -> list[str]:
    return [_ms(record["router"]["total_ms"]), _ms(_experts_ms(record, name)), _ms(total)]


def _backend_table(record: dict[str, Any]) -> Table:
    table = _table(
        "backend", "mode", "median ms", "min", "quartiles", "TFLOP/s", "of bound", "of floor"
    )
    for name, backend in record["backends"].items():
        for i, (mode, figures) in enumerate(backend["modes"].items()):
            label = f"{name} WRONG" if backend["wrong"] else name
            table.add_row(
                label if i == 0 else "",
                mode,
                _ms(figures["median_ms"]),
                _ms(figures["min_ms"]),
                f"{_ms(figures['q1_ms'])}..{_ms(figures['q3_ms'])}",
                _rate(figures["tflops"]),
                _share(figures["of_bound"]),
                _share(figures["of_floor"]),
            )
    return table


def _print_router(record: dict[str, Any], console: Console) -> None:
    parts = [
        f"{name.replace('_', '-')} {_ms(figures['median_ms'])}"
        for name, figures in record["router"].items()
        if name != "total_ms"
    ]
    total = _ms(record["router"]["total_ms"])
    console.print(f"router, ms: {', '.join(parts)}; together {total}")


def _piece_table(record: dict[str, Any]) -> Table:
    table = _table("backend", "kernels", "median ms", "TFLOP/s", "GB/s", "of floor")
    for name, pieces in record["pieces"].items():
        for i, (piece, figures) in enumerate(pieces.items()):
            table.add_row(
                name if i == 0 else "",
                piece,
                _ms(figures["ms"]),
                _rate(figures["tflops"]),
                _rate(figures["gb_per_s"]),
                _share(figures["of_floor"]),
            )
    return table


def _tile_table(name: str, tiles: list[dict[str, Any]]) -> Table:
    table = _table(f"kernel of {name}", "tile", "median ms", "")
    for tile in tiles:
        table.add_row(tile["kernel"], tile["config"], _ms(tile["ms"]), tile["why_not"] or "")
    return table


def _print_best_tiles(tiles: list[dict[str, Any]], console: Console) -> None:
    for kernel in dict.fromkeys(tile["kernel"] for tile in tiles):
        rivals = [tile for tile in tiles if tile["kernel"] == kernel]
        timed = [tile for tile in rivals if tile["ms"] is not None]
        if timed:
            best = min(timed, key=lambda tile: float(tile["ms"]))
            default = _ms(rivals[0]["ms"])
            console.print(
                f"best {kernel}: {best['config']}, {_ms(best['ms'])} ms; the default {default}"
            )


def _profile_table(name: str, kernels: list[dict[str, Any]]) -> Table:
    table = _table(f"kernel of {name}", "calls", "ms")
    for kernel in kernels[:PROFILED]:
        table.add_row(kernel["name"][:90], str(kernel["calls"]), _ms(kernel["ms"]))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        words = i == 0 or column in ("mode", "routing", "kernels", "tile", "")
        table.add_column(Text(column), justify="left" if words else "right", no_wrap=True)
    return table


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _rate(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
