"""The tokenizer of a data set: a given tokenizer.json, or a byte-level BPE trained on its text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from distmoe.data.manifest import token_dtype_name
from distmoe.data.spec import END_OF_DOCUMENT

TRAINING_CHARACTERS = 200_000_000
"""A trained tokenizer has seen the first characters of the training split, up to this many."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> str:
    """tokenizer.json of a byte-level BPE with at most ``vocab_size`` tokens.

    ``texts`` is consumed lazily; memory grows with the number of distinct words. Small texts give
    fewer tokens. Any text can be encoded and decodes to itself.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_characters(texts, TRAINING_CHARACTERS), trainer)
    return tokenizer.to_str()


def _first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return


class Encoder:
    """Text to token ids, and the sizes that a manifest records."""

    def __init__(self, tokenizer_json: str, eod_token: str = END_OF_DOCUMENT) -> None:
        try:
            self.tokenizer = Tokenizer.from_str(tokenizer_json)
        except Exception as error:
            raise ValueError(f"the tokenizer is not a tokenizer.json ({error})") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        # A document that contains the text of a special token must not forge a boundary.
        self.tokenizer.encode_special_tokens = True
        self.vocab_size = 1 + max(self.tokenizer.get_vocab().values(), default=-1)
        eod_id = self.tokenizer.token_to_id(eod_token)
        if eod_id is None:
            raise ValueError(f"--eod-token is '{eod_token}'; the tokenizer has no such token")
        self.eod_token, self.eod_id = eod_token, int(eod_id)
        self.dtype_name = token_dtype_name(self.vocab_size)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """One array of ids per text, without special tokens."""
        dtype = np.dtype(self.dtype_name).newbyteorder("<")
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype) for encoding in encodings]

    def encode_in_one_thread(self, texts: list[str]) -> list[np.ndarray]:
        """The same without parallel threads, where other processes have the other cores."""
        # The tokenizer spreads the texts of a call over its threads, so a text a call uses one.
        return [self.encode([text])[0] for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the ids, special tokens included."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False)
