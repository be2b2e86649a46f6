"""The rule as one process would apply it to all tokens, with loops and whole sorts: the oracle.

Shares no code with the implementation. Slow; for tests and as the specification.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor


def round_all_tokens(
    score_TE: Tensor,
    top_k: int,
    *,
    tile: int,
    rule: str,
    groups: int,
    capacity_factor: Fraction | None = None,
    capacity_runs: int = 0,
) -> tuple[Tensor, Tensor]:
    """The top-k choice and the rounded choice, [T, E] bool, for the tokens of all ranks.
    ``capacity_runs``: equal runs of experts that share a capacity; 0: each expert has its own."""
    rows = [[int(score * 2**24) for score in row] for row in score_TE.tolist()]
    key_TE = torch.tensor(rows, dtype=torch.int32).view(score_TE.shape)
    chosen_TE = kept_TE = top_k_reference(key_TE, top_k)
    if capacity_factor is not None:
        unit, runs = 1 if rule == "none" else tile, capacity_runs or score_TE.shape[1]
        kept_TE = capped(key_TE, chosen_TE, capacity_factor, unit, runs)
    if rule == "score":
        target_E = score(key_TE, kept_TE, tile)
    else:
        target_E = RULES[rule](kept_TE.sum(0).tolist(), tile, len(rows), groups)
    return chosen_TE, select_reference(key_TE, kept_TE, torch.tensor(target_E))


def capped(key_TE: Tensor, chosen_TE: Tensor, factor: Fraction, tile: int, runs: int) -> Tensor:
    """[T, E] bool: of each expert the highest keys, as many as fit into its tiles. A run of experts
    has those that hold ``factor`` times the mean, given out one at a time, each to the expert with
    the fewest, of those the fullest, that has use for one."""
    freq_E = chosen_TE.sum(0).tolist()
    budget, size = 0, len(freq_E) // runs
    while budget * tile < factor * sum(freq_E) / runs:
        budget += 1
    tiles_E = [0] * len(freq_E)
    for first in range(0, len(freq_E), size):
        for _ in range(budget):
            wants = [e for e in range(first, first + size) if tiles_E[e] * tile < freq_E[e]]
            if wants:
                tiles_E[min(wants, key=lambda e: (tiles_E[e], -freq_E[e], e))] += 1
    kept = [min(freq, tiles * tile) for freq, tiles in zip(freq_E, tiles_E, strict=True)]
    return select_reference(key_TE, chosen_TE, torch.tensor(kept))


def top_k_reference(key_TE: Tensor, top_k: int) -> Tensor:
    """[T, E] bool: the largest keys of every token, ties to the lower expert id."""
    chosen_TE = torch.zeros_like(key_TE, dtype=torch.bool)
    for token, key_E in enumerate(key_TE.tolist()):
        chosen_TE[token, sorted(range(len(key_E)), key=lambda e: (-key_E[e], e))[:top_k]] = True
    return chosen_TE


def select_reference(key_TE: Tensor, chosen_TE: Tensor, target_E: Tensor) -> Tensor:
    """[T, E] bool with ``target_E`` tokens an expert: its highest unchosen keys are added, or its
    lowest chosen keys dropped. Equal keys: the lower token wins an add, the higher loses a drop."""
    selected_TE = chosen_TE.clone()
    for expert, target in enumerate(target_E.tolist()):
        key_T, chosen_T = key_TE[:, expert].tolist(), chosen_TE[:, expert].tolist()
        missing = target - sum(chosen_T)
        others = [token for token, chosen in enumerate(chosen_T) if not chosen]
        chosen = [token for token, chosen in enumerate(chosen_T) if chosen]
        highest = sorted(others, key=lambda t: (-key_T[t], t))
        lowest = sorted(chosen, key=lambda t: (key_T[t], -t))
        selected_TE[highest[: max(missing, 0)], expert] = True
        selected_TE[lowest[: max(-missing, 0)], expert] = False
    return selected_TE


def none(freq_E: list[int], tile: int, num_tokens: int, groups: int) -> list[int]:
    """n_e = f_e."""
    return freq_E


def nearest(freq_E: list[int], tile: int, num_tokens: int, groups: int) -> list[int]:
    """The nearer multiple of the tile; a tie drops."""
    target_E = []
    for freq in freq_E:
        down, up = freq // tile * tile, (freq // tile + 1) * tile
        target_E.append(up if up - freq < freq - down and up <= num_tokens else down)
    return target_E


def balance(freq_E: list[int], tile: int, num_tokens: int, groups: int) -> list[int]:
    """Water-filling, one tile and one expert at a time."""
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


def up(freq_E: list[int], tile: int, num_tokens: int, groups: int) -> list[int]:
    """Up wherever there are as many tokens."""
    return [min(-(-freq // tile), max(num_tokens // tile, freq // tile)) * tile for freq in freq_E]


def down(freq_E: list[int], tile: int, num_tokens: int, groups: int) -> list[int]:
    """Whole tiles only."""
    return [freq - freq % tile for freq in freq_E]


def stochastic(
    freq_E: list[int], tile: int, num_tokens: int, groups: int, seed: int = 0
) -> list[int]:
    """Up if splitmix64 of the counts draws below the rest."""
    target_E = []
    for freq, drawn in zip(freq_E, draws(freq_E, seed), strict=True):
        goes_up = drawn % tile < freq % tile and (freq // tile + 1) * tile <= num_tokens
        target_E.append((freq // tile + goes_up) * tile)
    return target_E


def score(key_TE: Tensor, chosen_TE: Tensor, tile: int, seed: int = 0) -> list[int]:
    """Up if the draw of `stochastic` falls into the share of what rounding down would lose."""
    freq_E = chosen_TE.sum(0).tolist()
    target_E = []
    for e, (freq, drawn) in enumerate(zip(freq_E, draws(freq_E, seed), strict=True)):
        chosen = sorted(key_TE[chosen_TE[:, e], e].tolist())
        others = sorted(key_TE[~chosen_TE[:, e], e].tolist(), reverse=True)
        rest = freq % tile
        lost = sum(chosen[:rest])
        total = max(lost + (sum(others[: tile - rest]) if rest else 0), 1)
        goes_up = (drawn >> 42) * total < lost * 2**20
        fits = (freq // tile + 1) * tile <= len(key_TE)
        target_E.append((freq // tile + (goes_up and fits and rest > 0)) * tile)
    return target_E


def draws(freq_E: list[int], seed: int) -> list[int]:
    """A number in 0..2^62-1 for every expert, from the seed and all counts."""
    golden = 0x9E3779B97F4A7C15
    counts = sum(splitmix64((e + 1) * golden + freq) for e, freq in enumerate(freq_E))
    state = splitmix64(counts + seed * golden)
    return [splitmix64(state + (e + 1) * golden) % 2**62 for e in range(len(freq_E))]


def splitmix64(x: int) -> int:
    """The mixing function of the generator, modulo 2^64."""
    x %= 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


RULES: dict[str, Callable[[list[int], int, int, int], list[int]]] = {
    "none": none,
    "nearest": nearest,
    "balance": balance,
    "up": up,
    "down": down,
    "stochastic": stochastic,
}
