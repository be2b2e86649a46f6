"""Text, JSONL, Parquet and Arrow files as one stream of numbered documents.

A document is a whole text file, a JSONL line or a row of a table. It arrives as one or more pieces,
so that a text file of any size passes through bounded memory.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from distmoe.data.arrow_files import open_zstd, read_arrow, read_parquet, saved_files

TEXT, JSONL, PARQUET, ARROW = ".txt", ".jsonl", ".parquet", ".arrow"
COMPRESSED = (".gz", ".xz", ".zst")
PIECE_CHARACTERS = 1 << 16

# After a single line end no byte-level pre-tokenizer joins the two sides: a cut there gives the
# tokens of the uncut text.
_LINE_START = re.compile(r"(?<=\S\n)(?=\S)")


@dataclass(frozen=True, slots=True)
class Piece:
    """Some characters of a document, in order."""

    document: int
    """Number of the document, over all files."""
    text: str
    last: bool
    """This piece ends its document."""
    source: int
    """Number of the file."""
    first_document: int
    """Number of the file's first document."""
    position: int
    """Bytes of the file that have been read."""


@dataclass(frozen=True)
class SourceFile:
    """One input: ``name`` does not depend on where the user stands."""

    path: Path
    name: str

    @property
    def format(self) -> str:
        """.txt, .jsonl, .parquet, .arrow, or another suffix that nothing here reads."""
        suffixes = [suffix.lower() for suffix in self.path.suffixes[-2:]]
        if suffixes and suffixes[-1] in COMPRESSED:
            suffixes.pop()
        return suffixes[-1] if suffixes else ""


def find_sources(inputs: tuple[Path, ...]) -> list[SourceFile]:
    """The files to read, in order: the inputs as given, folders searched and sorted by name.

    ValueError for an input that is missing, of an unknown format, or a folder without text.
    """
    found: list[SourceFile] = []
    for path in inputs:
        if path.is_dir():
            readable = _files_of(path)
            if not readable:
                raise ValueError(
                    f"input is '{path}'; no .txt, .jsonl, .parquet or .arrow file in it"
                )
            found += sorted(readable, key=lambda file: file.name)
        elif not path.is_file():
            raise ValueError(f"input is '{path}'; there is no such file or folder")
        else:
            found.append(SourceFile(path, path.name))
    for file in found:
        if file.format not in _READERS:
            raise ValueError(
                f"input is '{file.path}'; allowed are .txt, .jsonl (both also .gz, .xz, .zst), "
                ".parquet, .arrow"
            )
    return found


def _files_of(folder: Path) -> list[SourceFile]:
    """What can be read below ``folder``; of a saved data set its data, not its caches."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    saved = {parent: saved_files(parent) for parent in sorted({path.parent for path in paths})}
    files = []
    for path in paths:
        file, data = SourceFile(path, path.relative_to(folder).as_posix()), saved[path.parent]
        if file.format in _READERS and (file.format != ARROW or data is None or path in data):
            files.append(file)
    return files


def read_pieces(
    sources: list[SourceFile], text_key: str, *, source: int = 0, first_document: int = 0
) -> Iterator[Piece]:
    """Documents from file number ``source`` on, whose first one is number ``first_document``.

    ValueError, with file and line, for text that is not UTF-8 and for records without text.
    """
    for number in range(source, len(sources)):
        document = first_document
        for text, last, position in _READERS[sources[number].format](sources[number], text_key):
            yield Piece(document, text, last, number, first_document, position)
            document += last
        first_document = document


@contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, IO[str]]]:
    """The raw file, whose position shows the progress, and its decoded text."""
    with open(path, "rb") as raw:
        stream: BinaryIO = raw
        if path.suffix.lower() == ".gz":
            stream = cast(BinaryIO, gzip.open(raw, "rb"))
        elif path.suffix.lower() == ".xz":
            stream = cast(BinaryIO, lzma.open(raw, "rb"))
        elif path.suffix.lower() == ".zst":
            stream = open_zstd(path, raw)
        try:
            yield raw, io.TextIOWrapper(stream, encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"input is '{path}'; it is not UTF-8 text ({error})") from error
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            raise ValueError(
                f"input is '{path}'; it is damaged or cannot be read ({error})"
            ) from error


def _read_text(file: SourceFile, text_key: str) -> Iterator[tuple[str, bool, int]]:
    with _open(file.path) as (raw, stream):
        held = ""
        while block := stream.read(PIECE_CHARACTERS):
            held += block
            cut = _last_line_start(held)
            if cut:
                yield held[:cut], False, raw.tell()
                held = held[cut:]
        yield held, True, raw.tell()


def _last_line_start(text: str) -> int:
    """Where the last line of ``text`` begins that a cut can be made before; 0 if nowhere."""
    if len(text) < PIECE_CHARACTERS:
        return 0
    cut = 0
    for match in _LINE_START.finditer(text, len(text) // 2):
        cut = match.start()
    return cut


def _read_jsonl(file: SourceFile, text_key: str) -> Iterator[tuple[str, bool, int]]:
    with _open(file.path) as (raw, stream):
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _jsonl_text(line, text_key, f"{file.path} line {number}"), True, raw.tell()


def _jsonl_text(line: str, text_key: str, place: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
    if not isinstance(record, dict) or text_key not in record:
        keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{place}: --text-key is '{text_key}'; the record has: {keys}")
    return _checked_text(record[text_key], text_key, place)


def _checked_text(text: Any, text_key: str, place: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{place}: '{text_key}' is {type(text).__name__}; it must be a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: '{text_key}' is not valid Unicode ({error.reason})") from error
    return text


def _read_parquet(file: SourceFile, text_key: str) -> Iterator[tuple[str, bool, int]]:
    return _read_rows(file, text_key, read_parquet(file.path, text_key))


def _read_arrow(file: SourceFile, text_key: str) -> Iterator[tuple[str, bool, int]]:
    return _read_rows(file, text_key, read_arrow(file.path, text_key))


def _read_rows(
    file: SourceFile, text_key: str, rows: Iterator[tuple[Any, int]]
) -> Iterator[tuple[str, bool, int]]:
    for number, (text, position) in enumerate(rows, 1):
        yield _checked_text(text, text_key, f"{file.path} row {number}"), True, position


_READERS = {TEXT: _read_text, JSONL: _read_jsonl, PARQUET: _read_parquet, ARROW: _read_arrow}
