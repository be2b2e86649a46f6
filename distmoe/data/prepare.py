"""Text files -> a folder of tokenized shards with a manifest, in bounded memory, resumable.

pieces of documents -> split (holdout) -> ids (tokenizer) -> shards -> journal -> manifest
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

from rich.console import Console

from distmoe.data.encoding import encode_pieces
from distmoe.data.files import UNFINISHED, sha256_of_file, sha256_of_text, write_text
from distmoe.data.holdout import TRAIN, VALIDATION, SplitPiece, assign, few_documents
from distmoe.data.journal import (
    JOURNAL_NAME,
    Journal,
    SplitProgress,
    describe_sources,
    load_journal,
    require_same,
)
from distmoe.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    Shard,
    Totals,
    check_files,
    make_split,
    read_manifest,
    write_manifest,
)
from distmoe.data.progress import PrepareProgress
from distmoe.data.shards import ShardWriter
from distmoe.data.sources import SourceFile, find_sources, read_pieces
from distmoe.data.spec import PrepareSpec, check_spec
from distmoe.data.tokenizer import Encoder, train_tokenizer

SPLITS = (TRAIN, VALIDATION)


def prepare(spec: PrepareSpec, console: Console | None = None) -> Manifest:
    """Make, or go on making, the data set of ``spec`` in ``spec.out``.

    The same call goes on after an interruption at the last finished shard, and does nothing when
    the work is done. ValueError for wrong settings, for unreadable records, and if the folder
    holds another preparation that has finished a shard.
    """
    check_spec(spec)
    console = console or Console(stderr=True)
    given_tokenizer = spec.tokenizer.read_text(encoding="utf-8") if spec.tokenizer else None
    spec.out.mkdir(parents=True, exist_ok=True)
    if spec.force:
        _remove_products(spec.out)
    files = find_sources(spec.inputs)
    journal = _open_journal(spec, files)
    if (spec.out / MANIFEST_NAME).is_file():
        console.print(f"{spec.out} is complete already; nothing to do", highlight=False)
        return read_manifest(spec.out)
    journal.save(spec.out)
    return _Preparation(spec, files, journal, console).run(given_tokenizer)


def _open_journal(spec: PrepareSpec, files: list[SourceFile]) -> Journal:
    """The journal to go on with; ValueError if the folder belongs to another preparation."""
    known = load_journal(spec.out)
    if known is None and (spec.out / MANIFEST_NAME).is_file():
        raise ValueError(
            f"--out is '{spec.out}'; it holds a data set without {JOURNAL_NAME}; "
            "choose another folder, or redo it with --force"
        )
    request = {
        "tokenizer_sha256": sha256_of_file(spec.tokenizer) if spec.tokenizer else None,
        "vocab_size": None if spec.tokenizer else spec.vocab_size,
        "eod_token": spec.eod_token,
        "text_key": spec.text_key,
        "validation_fraction": spec.validation_fraction,
        "shard_tokens": spec.shard_tokens,
        "seed": spec.seed,
    }
    sources, seen = describe_sources(files, known)
    journal = Journal(request, sources, seen, splits={name: SplitProgress() for name in SPLITS})
    if known is None or (not known.has_shards and not known.is_same(journal)):
        return journal
    require_same(spec.out, known, journal)
    journal.tokenizer_sha256, journal.splits = known.tokenizer_sha256, known.splits
    return journal


class _Preparation:
    """The state of one run: the journal is on disk whenever a shard is finished."""

    def __init__(
        self, spec: PrepareSpec, files: list[SourceFile], journal: Journal, console: Console
    ) -> None:
        self._spec = spec
        self._files = files
        self._journal = journal
        self._console = console
        self._fraction = Fraction(spec.validation_fraction).limit_denominator(1_000_000)
        self._lengths = few_documents(read_pieces(files, spec.text_key), self._fraction)
        sizes = [source.bytes for source in journal.sources]
        self._offsets = list(accumulate(sizes, initial=0))

    def run(self, given_tokenizer: str | None) -> Manifest:
        tokenizer_json = self._tokenizer(given_tokenizer)
        encoder = Encoder(tokenizer_json, self._spec.eod_token)
        self._check_finished_shards(encoder)
        self._encode(encoder)
        manifest = self._manifest(encoder)
        write_manifest(self._spec.out, manifest)
        return manifest

    def _tokenizer(self, given: str | None) -> str:
        path = self._spec.out / TOKENIZER_NAME
        if self._journal.tokenizer_sha256:
            text = path.read_text(encoding="utf-8") if path.is_file() else ""
            if sha256_of_text(text) != self._journal.tokenizer_sha256:
                raise ValueError(f"{path} has changed since the work began; redo with --force")
            return text
        text = self._train_tokenizer() if given is None else given
        Encoder(text, self._spec.eod_token)
        write_text(path, text)
        self._journal.tokenizer_sha256 = sha256_of_text(text)
        self._journal.save(self._spec.out)
        return text

    def _train_tokenizer(self) -> str:
        stage = f"training a tokenizer of {self._spec.vocab_size} tokens"
        with self._progress(stage) as progress:

            def texts() -> Iterator[str]:
                for item in self._split_pieces(source=0, first_document=0):
                    progress.update(self._position(item), "reading")
                    if item.split == TRAIN:
                        yield item.text

            return train_tokenizer(texts(), self._spec.vocab_size)

    def _check_finished_shards(self, encoder: Encoder) -> None:
        finished = {
            name: make_split(tuple(split.shards)) for name, split in self._journal.splits.items()
        }
        check_files(self._spec.out, finished, dtype=encoder.dtype_name)
        shards = sum(len(split.shards) for split in finished.values())
        if shards:
            self._console.print(f"going on after {shards} finished shards", highlight=False)

    def _split_pieces(self, *, source: int, first_document: int) -> Iterator[SplitPiece]:
        pieces = read_pieces(
            self._files, self._spec.text_key, source=source, first_document=first_document
        )
        return assign(pieces, self._fraction, seed=self._spec.seed, lengths=self._lengths)

    def _encode(self, encoder: Encoder) -> None:
        splits = self._journal.splits
        writers = {
            name: ShardWriter(
                self._spec.out,
                name,
                shard_tokens=self._spec.shard_tokens,
                eod_id=encoder.eod_id,
                first_shard=len(splits[name].shards),
            )
            for name in SPLITS
        }
        try:
            last = self._encode_into(writers, encoder)
            for name, writer in writers.items():
                shard = writer.finish()
                if shard is not None:
                    self._record(name, shard, last[name])
        finally:
            for writer in writers.values():
                writer.close()

    def _encode_into(
        self, writers: dict[str, ShardWriter], encoder: Encoder
    ) -> dict[str, SplitPiece]:
        """Encode what no finished shard holds; returns the last piece of each split."""
        splits = self._journal.splits
        start = min((split.source, split.first_document) for split in splits.values())
        pieces = self._split_pieces(source=start[0], first_document=start[1])
        wanted = (p for p in pieces if p.piece.document >= splits[p.split].next_document)
        tokens = sum(shard.tokens for split in splits.values() for shard in split.shards)
        last: dict[str, SplitPiece] = {}
        with self._progress("tokenizing") as progress:
            for batch, arrays in encode_pieces(wanted, encoder, workers=self._spec.workers):
                for item, ids in zip(batch, arrays, strict=True):
                    tokens += len(ids)
                    last[item.split] = item
                    shard = writers[item.split].append(ids, item.last)
                    if shard is not None:
                        self._record(item.split, shard, item)
                progress.update(self._position(batch[-1]), f"{tokens:,} tokens")
        return last

    def _record(self, split: str, shard: Shard, item: SplitPiece) -> None:
        progress = self._journal.splits[split]
        progress.shards.append(shard)
        progress.next_document = item.piece.document + 1
        progress.source = item.piece.source
        progress.first_document = item.piece.first_document
        self._journal.save(self._spec.out)

    def _progress(self, stage: str) -> PrepareProgress:
        return PrepareProgress(self._console, stage, total_bytes=self._offsets[-1])

    def _position(self, item: SplitPiece) -> int:
        return self._offsets[item.piece.source] + item.piece.position

    def _manifest(self, encoder: Encoder) -> Manifest:
        splits = {
            name: make_split(tuple(split.shards)) for name, split in self._journal.splits.items()
        }
        if splits[TRAIN].tokens == 0:
            raise ValueError(f"the inputs ({len(self._files)} files) hold no text")
        return Manifest(
            format_version=FORMAT_VERSION,
            dtype=encoder.dtype_name,
            vocab_size=encoder.vocab_size,
            eod_token=self._spec.eod_token,
            eod_id=encoder.eod_id,
            tokenizer_sha256=self._journal.tokenizer_sha256,
            splits=splits,
            sources=tuple(self._journal.sources),
            totals=Totals(
                tokens=sum(split.tokens for split in splits.values()),
                documents=sum(split.documents for split in splits.values()),
                source_bytes=self._offsets[-1],
            ),
            settings=self._journal.request,
        )


def _remove_products(directory: Path) -> None:
    """Remove what a preparation leaves in its folder, and nothing else; the manifest first."""
    for name in (MANIFEST_NAME, JOURNAL_NAME, TOKENIZER_NAME):
        (directory / name).unlink(missing_ok=True)
    for split in SPLITS:
        for suffix in (".bin", ".idx"):
            for shard in directory.glob(f"{split}-[0-9]*{suffix}"):
                shard.unlink()
            for shard in directory.glob(f"{split}-[0-9]*{suffix}{UNFINISHED}"):
                shard.unlink()
