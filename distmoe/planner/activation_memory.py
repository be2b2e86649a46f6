"""Bytes that one MoE layer keeps for its backward, and the most it holds in between: the formula.
`bench.layer_memory` measures them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ActivationShape:
    """T tokens, H, I and E experts of one layer on one rank, with ``pairs`` computed pairs and G
    the width of z. ``itemsize``: bytes of an activation."""

    T: int
    H: int
    I: int
    E: int
    G: int
    pairs: int
    itemsize: int = 2


def keeps(s: ActivationShape) -> dict[str, int]:
    """Bytes kept from forward to backward, by what they are; parameters are not among them.

    x is the layer's input, which the block before it holds anyway. Weight-sized terms (a bf16 copy
    of the expert weights where they are gathered, and their gradients) are 2 E (G + I) H bytes
    each and independent of the tokens: state them apart.
    """
    return {
        "x": s.itemsize * s.T * s.H,
        "z": s.itemsize * s.pairs * s.G,
        "pair index and scores": 4 * (3 * s.pairs + (s.T + 1) + (s.E + 1)),
        # Logits for the z-loss, scores, the top-k choice, two numbers a token, and where each pair
        # lies in [T, E].
        "router": s.T * s.E * (4 + 4 + 1) + 8 * s.T + 8 * s.pairs + 4 * s.E,
    }


def transient(s: ActivationShape) -> dict[str, int]:
    """Bytes that a pass adds at its widest point to what is kept, its results among them.

    Forward: a and y of every pair, and the output. Backward: dz and a_scaled of every pair, dx of
    the tokens, and beside them first dx of every pair, then the weight gradients.
    """
    rows = s.itemsize * s.T * s.H
    per_pair = s.itemsize * s.pairs
    gradients = s.itemsize * s.E * (s.G + s.I) * s.H
    return {
        "forward": per_pair * (s.I + s.H) + rows,
        "backward": per_pair * (s.G + s.I) + rows + max(per_pair * s.H, gradients),
    }
