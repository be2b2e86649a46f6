"""Bars of TFLOP/s by shape and backend, a panel a mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(records: list[dict[str, Any]], device: str, path: Path) -> None:
    """Write a picture in the format of the file's ending. Backends without a time have no bar."""
    from matplotlib.figure import Figure

    bars = [
        (name, mode)
        for record in records
        for name, backend in record["backends"].items()
        for mode in backend["modes"]
    ]
    names = list(dict.fromkeys(name for name, _ in bars))
    modes = list(dict.fromkeys(mode for _, mode in bars)) or ["both"]
    figure = Figure(figsize=(max(6, 1.5 * len(records) + 2), 3 * len(modes)), layout="constrained")
    panels = figure.subplots(len(modes), 1, squeeze=False)[:, 0]
    for mode, panel in zip(modes, panels, strict=True):
        _draw_mode(panel, records, names, mode)
    if names:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(f"One layer's experts on {device}: median, quartiles", fontsize="medium")
    figure.savefig(path, dpi=150)


def _draw_mode(panel: Any, records: list[dict[str, Any]], names: list[str], mode: str) -> None:
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        timed = {
            j + (i - (len(names) - 1) / 2) * width: record["backends"][name]["modes"][mode]
            for j, record in enumerate(records)
            if mode in record["backends"][name]["modes"]
        }
        rates = [figures["tflops"] for figures in timed.values()]
        low, high = (
            [abs(f["tflops"] * (f["median_ms"] / f[quartile] - 1)) for f in timed.values()]
            for quartile in ("q3_ms", "q1_ms")
        )
        panel.bar(
            list(timed), rates, width, label=name, color=f"C{i}",
            yerr=[low, high] if timed else None, error_kw={"elinewidth": 0.8},
        )  # fmt: skip
    rules = ["" if record["rounding"] == "none" else record["rounding"] for record in records]
    labels = [
        f"{record['shape']['name']}\n{rule}" for record, rule in zip(records, rules, strict=True)
    ]
    panel.set_xticks(range(len(records)), labels, fontsize="small")
    panel.set_xlim(-0.5, len(records) - 0.5)
    panel.set_ylabel(f"{mode}, TFLOP/s")
    panel.grid(axis="y", linewidth=0.3)
    panel.set_axisbelow(True)
