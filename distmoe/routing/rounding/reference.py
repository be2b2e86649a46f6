"""The rule as one process would apply it to all tokens, with loops and whole sorts: the oracle.

Shares no code with the implementation. Slow; for tests and as the specification.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def round_all_tokens(
    score_TE: Tensor, top_k: int, *, tile: int, rule: str, groups: int
) -> tuple[Tensor, Tensor]:
    """The top-k choice and the rounded choice, [T, E] bool, for the tokens of all ranks."""
    key_TE = [[int(score * 2**24) for score in row] for row in score_TE.tolist()]
    chosen_TE = torch.zeros_like(score_TE, dtype=torch.bool)
    for token, key_E in enumerate(key_TE):
        best = sorted(range(len(key_E)), key=lambda e: (-key_E[e], e))[:top_k]
        chosen_TE[token, best] = True
    freq_E: list[int] = chosen_TE.sum(0).tolist()
    target_E = RULES[rule](freq_E, tile, len(key_TE), groups)
    selected_TE = chosen_TE.clone()
    for expert, (freq, target) in enumerate(zip(freq_E, target_E, strict=True)):
        chosen = [t for t in range(len(key_TE)) if chosen_TE[t, expert]]
        others = [t for t in range(len(key_TE)) if not chosen_TE[t, expert]]
        lowest = sorted(chosen, key=lambda t: (key_TE[t][expert], -t))
        highest = sorted(others, key=lambda t: (-key_TE[t][expert], t))
        selected_TE[lowest[: max(freq - target, 0)], expert] = False
        selected_TE[highest[: max(target - freq, 0)], expert] = True
    return chosen_TE, selected_TE


def none(freq_E: list[int], tile: int, num_tokens: int, groups: int) -> list[int]:
    return freq_E


def nearest(freq_E: list[int], tile: int, num_tokens: int, groups: int) -> list[int]:
    target_E = []
    for freq in freq_E:
        down, up = freq // tile * tile, (freq // tile + 1) * tile
        target_E.append(up if up - freq < freq - down and up <= num_tokens else down)
    return target_E


def balance(freq_E: list[int], tile: int, num_tokens: int, groups: int) -> list[int]:
    tiles_E = [freq // tile for freq in freq_E]
    rest_E = [freq % tile for freq in freq_E]
    may_E = [
        rest > 0 and (tiles + 1) * tile <= num_tokens
        for rest, tiles in zip(rest_E, tiles_E, strict=True)
    ]
    run = len(freq_E) // groups
    base_r = [sum(tiles_E[r * run : (r + 1) * run]) for r in range(groups)]
    may_r = [sum(may_E[r * run : (r + 1) * run]) for r in range(groups)]
    wanted = min((2 * sum(rest_E) + tile) // (2 * tile), sum(may_E))
    level = max(base_r)
    while sum(min(may, level - base) for may, base in zip(may_r, base_r, strict=True)) < wanted:
        level += 1
    room_r = [min(may, level - base) for may, base in zip(may_r, base_r, strict=True)]
    for expert in sorted(range(len(freq_E)), key=lambda e: (-rest_E[e], e)):
        if wanted and may_E[expert] and room_r[expert // run]:
            tiles_E[expert] += 1
            room_r[expert // run] -= 1
            wanted -= 1
    return [tiles * tile for tiles in tiles_E]


RULES: dict[str, Callable[[list[int], int, int, int], list[int]]] = {
    "none": none,
    "nearest": nearest,
    "balance": balance,
}
