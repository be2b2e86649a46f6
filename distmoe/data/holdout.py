"""Which documents are held out for validation.

With validation fraction f, document d belongs to stratum j = floor(d * f), a run of floor or ceil
of 1 / f documents. One document of every stratum is held out, chosen by a hash of (seed, j). The
choice depends on d and the seed only, and the share is f for any number of documents.

Fewer documents than a stratum, or fewer than 20, would leave little or nothing to validate on;
then the end of each document is held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from fractions import Fraction
from math import ceil
from typing import NamedTuple

from distmoe.data.sources import Piece

TRAIN, VALIDATION = "train", "validation"
FEW_DOCUMENTS = 20


class SplitPiece(NamedTuple):
    """A piece of text and where it goes. ``last``: it ends the document in that split."""

    split: str
    text: str
    last: bool
    piece: Piece


def is_held_out(document: int, fraction: Fraction, *, seed: int) -> bool:
    """Whether this document is its stratum's choice."""
    if fraction == 0:
        return False
    stratum = int(document * fraction)
    start, end = ceil(stratum / fraction), ceil((stratum + 1) / fraction)
    digest = hashlib.sha256(f"{seed}:{stratum}".encode()).digest()
    return document == start + int.from_bytes(digest[:8], "little") % (end - start)


def few_documents(pieces: Iterable[Piece], fraction: Fraction) -> list[int] | None:
    """Characters of each document if there are few of them; None if there are enough."""
    if fraction == 0:
        return None
    enough = max(FEW_DOCUMENTS, ceil(1 / fraction))
    lengths: list[int] = []
    for piece in pieces:
        if piece.document == len(lengths):
            if len(lengths) == enough - 1:
                return None
            lengths.append(0)
        lengths[-1] += len(piece.text)
    return lengths


def assign(
    pieces: Iterable[Piece], fraction: Fraction, *, seed: int, lengths: list[int] | None
) -> Iterator[SplitPiece]:
    """Give each piece its split: by document, or by tails if ``lengths`` is given."""
    if lengths is not None:
        yield from _by_tail(pieces, fraction, lengths)
        return
    for piece in pieces:
        held_out = is_held_out(piece.document, fraction, seed=seed)
        yield SplitPiece(VALIDATION if held_out else TRAIN, piece.text, piece.last, piece)


def _by_tail(
    pieces: Iterable[Piece], fraction: Fraction, lengths: list[int]
) -> Iterator[SplitPiece]:
    document, seen, in_tail = -1, 0, False
    for piece in pieces:
        if piece.document != document:
            document, seen, in_tail = piece.document, 0, False
        if in_tail:
            yield SplitPiece(VALIDATION, piece.text, piece.last, piece)
            continue
        target = ceil(lengths[document] * (1 - fraction)) - seen
        seen += len(piece.text)
        in_tail = piece.last or target < len(piece.text)
        cut = _cut(piece.text, target) if in_tail else len(piece.text)
        yield SplitPiece(TRAIN, piece.text[:cut], in_tail, piece)
        if in_tail:
            yield SplitPiece(VALIDATION, piece.text[cut:], piece.last, piece)


def _cut(text: str, target: int) -> int:
    """The first line start shortly after ``target``, else the first space, else ``target``."""
    for mark, width in (("\n", 1), (" ", 0)):
        found = text.find(mark, target, target + 1000)
        if 0 <= found < len(text) - 1:
            return found + width
    return min(target, len(text))
