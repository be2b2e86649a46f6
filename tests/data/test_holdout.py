from __future__ import annotations

from fractions import Fraction
from math import floor

from hypothesis import given
from hypothesis import strategies as st

from distmoe.data.holdout import assign, few_documents, is_held_out
from distmoe.data.sources import Piece

fractions = st.integers(1, 500).map(lambda thousandths: Fraction(thousandths, 1000))


@given(fractions, st.integers(0, 5), st.integers(1, 3000))
def test_share_is_the_fraction_for_any_number_of_documents(
    fraction: Fraction, seed: int, count: int
) -> None:
    held_out = sum(is_held_out(document, fraction, seed=seed) for document in range(count))
    assert floor(count * fraction) <= held_out + 1
    assert held_out <= floor(count * fraction) + 1
    if count * fraction >= 1:
        assert held_out >= 1


def test_seed_changes_the_choice() -> None:
    choices = {
        tuple(d for d in range(100) if is_held_out(d, Fraction(1, 20), seed=seed))
        for seed in range(10)
    }
    assert len(choices) == 10
    assert all(len(choice) == 5 for choice in choices)


def test_no_fraction_holds_nothing_out() -> None:
    assert not any(is_held_out(document, Fraction(0), seed=1) for document in range(100))


def pieces_of(documents: list[list[str]]) -> list[Piece]:
    return [
        Piece(number, text, place == len(texts) - 1, 0, 0, 0)
        for number, texts in enumerate(documents)
        for place, text in enumerate(texts)
    ]


def test_few_documents_counts_characters_up_to_the_limit() -> None:
    assert few_documents(pieces_of([["abc", "de"], ["f"]]), Fraction(1, 20)) == [5, 1]
    assert few_documents(pieces_of([["a"]] * 19), Fraction(1, 20)) == [1] * 19
    assert few_documents(pieces_of([["a"]] * 20), Fraction(1, 20)) is None
    assert few_documents(pieces_of([["a"]] * 20), Fraction(1, 100)) == [1] * 20
    assert few_documents(pieces_of([["a"]]), Fraction(0)) is None


texts = st.text(alphabet="ab \n", max_size=30)


@given(st.lists(st.lists(texts, min_size=1, max_size=4), max_size=4), fractions)
def test_tails_lose_nothing_and_close_each_document_once(
    documents: list[list[str]], fraction: Fraction
) -> None:
    pieces = pieces_of(documents)
    items = list(assign(pieces, fraction, seed=1, lengths=few_documents(pieces, fraction)))
    for number, parts in enumerate(documents):
        mine = [item for item in items if item.piece.document == number]
        assert "".join(item.text for item in mine) == "".join(parts)
        splits = [item.split for item in mine]
        assert splits == sorted(splits)
        for split in ("train", "validation"):
            assert [i.last for i in mine if i.split == split][-1:] == [True]
            assert sum(i.last for i in mine if i.split == split) == 1
