"""The figures on the front page are those of the files of docs/benchmarks."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from typing import Any

from pages import ROOT

README = (ROOT / "README.md").read_text()
COMPARE = (ROOT / "docs/compare.md").read_text()


def figures(name: str) -> Any:
    return json.loads((ROOT / f"docs/benchmarks/{name}.json").read_text())


def row(beginning: str) -> list[str]:
    """The numbers in the second and third column of the line that begins so."""
    (line,) = re.findall(rf"^\| {re.escape(beginning)}.*$", README, re.MULTILINE)
    return re.findall(r"\d[\d,.]*\d|\d", "|".join(line.split("|")[2:4]))


def rows_of(way: str) -> str:
    """In what form they travel, "fp8 rows"; empty where it is that of the experts."""
    last = way.split(", ")[-1]
    return last if last.endswith(" rows") else ""


def fastest_ms(lines: list[dict[str, Any]], level: str, rows: str = "") -> str:
    """Of the ways of a level, or of the way of that name, with such rows: the fastest round."""
    timings = [line["timing"] for line in lines]
    rounds = [
        forward + backward
        for timing in timings
        if timing["name"].startswith(level) and rows_of(timing["name"]) == rows
        for forward, backward in zip(timing["forward_s"], timing["backward_s"], strict=True)
    ]
    return f"{1e3 * min(rounds):,.0f}"


def test_time_and_bytes_of_a_layer() -> None:
    lines = figures("dispatch-4-ranks-sleep")["lines"]
    ways = ("node", "rank", "all_to_all", "DeepSpeed")
    fastest = [fastest_ms(lines, way) for way in ways]
    assert row("ms of one layer, forward and backward, 4 ranks on 2 hosts") == fastest
    assert all(figure in COMPARE for figure in fastest)
    sent = sent_mib(lines, "", ("node", "rank", "copies"))
    assert row("MiB of rows between the hosts there") == sent
    assert all(figure in COMPARE for figure in (sent[0], sent[2]))


def test_time_and_bytes_of_fp8_rows() -> None:
    lines = figures("dispatch-4-ranks-sleep")["lines"]
    fastest = [fastest_ms(lines, way, "fp8 rows") for way in ("node", "rank")]
    assert row("with rows in fp8 in place of fp32") == fastest
    assert all(figure in COMPARE for figure in fastest)
    assert row("with rows in fp8 |") == sent_mib(lines, "fp8 rows", ("node", "rank"))


def sent_mib(lines: list[dict[str, Any]], rows: str, levels: Sequence[str]) -> list[str]:
    """Between the hosts, of the mean rank."""
    named = [(line["timing"], line["counted"]) for line in lines]
    counted = {t["level"]: sent for t, sent in named if rows_of(t["name"]) == rows}
    return [f"{counted[level] / 2**20:.2f}" for level in levels]


def test_tokens_per_second_over_two_hosts() -> None:
    runs = [run for pair in figures("training-two-hosts")["pairs"] for run in pair]
    want = [
        f"{statistics.median(run['tokens_per_s'] for run in runs if run['way'] == way):,.0f}"
        for way in ("defaults", "copies, no overlap")
    ]
    assert row("tokens/s of a training run") == want


def test_tiles_of_the_busiest_rank() -> None:
    even = next(it for it in figures("routing-simulation")["settings"] if it["skew"] == 0)
    outcomes = {outcome["name"]: outcome for outcome in even["outcomes"]}
    balance, top_k = outcomes["balance"], outcomes["top-k, padded"]
    mean = f"{balance['mean_tiles']:.0f}"
    tiles = [str(it["busiest_tiles"]) for it in (balance, top_k)]
    want = [tiles[0], mean, tiles[1], f"{100 * top_k['waste']:.1f}"]
    assert row("tiles of the busiest of 8 ranks") == want


def test_cost_of_rounding() -> None:
    costs = [cost for rank in figures("routing-cost")["ranks"] for cost in rank]

    def share(name: str) -> str:
        named = [cost for cost in costs if cost["name"] == name]
        total = sum(cost["layer_s"] for cost in named)
        return f"{100 * sum(cost['rounding_s'] for cost in named) / total:.1f}"

    want = [share("balance, exact by all-gather"), share("top-k")]
    assert row("CPU time of rounding in a layer's forward") == want


def test_kills_and_layouts() -> None:
    kills = figures("kills")["kills"]
    writing = sum(kill["was_writing"] for kill in kills)
    assert not any(kill["problems"] for kill in kills)
    lost = max(kill["lost_steps"] for kill in kills)
    beginning = f"checkpoints lost in {len(kills)} kills of a run of two ranks, {writing} of them"
    assert row(beginning) == [str(lost)]
    pairs = figures("resharding")["pairs"]
    equal = sum(not pair["different"] for pair in pairs)
    assert row("layouts (single") == [str(equal), str(len(pairs))]
