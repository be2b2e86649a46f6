"""The data of a run as one rank reads them: batches of a step, held-out batches, what was read."""

from __future__ import annotations

from collections.abc import Iterator

from distmoe.config import Config, corpora
from distmoe.config.sample_ranges import in_words, sample_ranges
from distmoe.data.batches import Batch, Batches, validation_batches
from distmoe.data.corpora import JoinedSplits
from distmoe.data.mixture import MixtureSampler
from distmoe.data.sampler import FROM_THE_START, DataPosition, GlobalBatchSampler
from distmoe.data.tokens import TokenSplit, unigram_entropy


class RunData:
    """Opened from a resolved and checked config; close it. ``begin``: where a resumed run goes on.
    ``unigram_entropy``: of the held-out tokens, corpora weighted as in the mix."""

    def __init__(
        self,
        config: Config,
        *,
        rank: int,
        world: int,
        begin: DataPosition = FROM_THE_START,
    ) -> None:
        self._config, self._rank, self._world = config, rank, world
        self.corpora = corpora(config.data)
        splits = [TokenSplit(corpus.path, "train") for corpus in self.corpora]
        self._held_out = [TokenSplit(corpus.path, "validation") for corpus in self.corpora]
        weighted = [
            corpus.weight * split.token_shares()
            for corpus, split in zip(self.corpora, self._held_out, strict=True)
        ]
        self.unigram_entropy = unigram_entropy(sum(weighted[1:], start=weighted[0]))
        self._num_samples = [split.num_samples(config.data.seq_len) for split in splits]
        self._sampler = self._make_sampler(begin)
        self._batches = Batches(
            splits[0] if len(splits) == 1 else JoinedSplits(splits),
            self._sampler,
            seq_len=config.data.seq_len,
            rank=rank,
            world=world,
            micro_batch_size=config.train.micro_batch_size,
            cp=config.parallel.cp,
            document_mask=config.data.document_mask,
        )

    def _make_sampler(self, begin: DataPosition) -> GlobalBatchSampler | MixtureSampler:
        size, seed = self._config.train.global_batch_size, self._config.run.seed
        skip = sample_ranges(self._config.data.skip)
        if len(self.corpora) == 1:
            return GlobalBatchSampler(self._num_samples[0], size, seed, begin, skip)
        shares = [corpus.share for corpus in self.corpora]
        return MixtureSampler(
            self._num_samples, shares, global_batch_size=size, seed=seed, begin=begin, skip=skip
        )

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of this rank in global batch ``step``, counted from 0."""
        return self._batches.step(step)

    def read(self, steps: int) -> Iterator[tuple[str, int, float]]:
        """Of each corpus its folder, and how many samples and epochs of it the first ``steps``
        global batches have taken; of those before a resume as if the mix had been the same."""
        read = self._sampler.read(steps)
        for corpus, samples, there in zip(self.corpora, read, self._num_samples, strict=True):
            yield corpus.path, samples, samples / there

    def reached(self, steps: int) -> DataPosition:
        """Where a run goes on after the first ``steps`` global batches."""
        return self._sampler.positions.reached(steps)

    def left_out(self, step: int) -> tuple[range, ...]:
        """What of data.skip lies right before, or in, global batch ``step``, counted from 0."""
        return self._sampler.positions.left_out(step)

    def held_out(self) -> Iterator[tuple[str, float, list[list[Batch]]]]:
        """Of each corpus its folder, its weight, and this rank's share of its first
        train.validation_batches global batches of held-out samples."""
        config = self._config
        for corpus, split in zip(self.corpora, self._held_out, strict=True):
            batches = validation_batches(
                split,
                config.train.validation_batches,
                global_batch_size=config.train.global_batch_size,
                seq_len=config.data.seq_len,
                rank=self._rank,
                world=self._world,
                micro_batch_size=config.train.micro_batch_size,
                cp=config.parallel.cp,
                document_mask=config.data.document_mask,
            )
            yield corpus.path, corpus.weight, list(batches)

    def describe(self) -> str:
        """The corpora and their shares, and what is left out, in a few words."""
        names = [self.corpora[0].path]
        if len(self.corpora) > 1:
            names = [f"{corpus.path} {corpus.weight:.4g}" for corpus in self.corpora]
        skip = sample_ranges(self._config.data.skip)
        left_out = [f"without samples {in_words(skip)}"] if skip else []
        return ", ".join([*names, *left_out])

    def close(self) -> None:
        """Stop the reading thread."""
        self._batches.close()
