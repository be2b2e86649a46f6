"""Files that pyarrow reads: Parquet, Arrow as Hugging Face `datasets` saves it, Zstandard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

SAVED_DATASET, SAVED_WITH, SAVED_SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
ROWS_AT_A_TIME = 1024


def open_zstd(path: Path, raw: BinaryIO) -> BinaryIO:
    """The bytes that the Zstandard file ``raw`` holds. Damage is an OSError when they are read."""
    pyarrow = _pyarrow(path)
    return cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))


def read_parquet(path: Path, column: str) -> Iterator[tuple[Any, int]]:
    """The values of a column, and the bytes of the file up to each, about."""
    pyarrow = _pyarrow(path)
    import pyarrow.parquet as parquet

    size = path.stat().st_size
    with _damage_named(path, pyarrow), parquet.ParquetFile(path) as table:
        _check_column(path, table.schema_arrow.names, column)
        rows, total = 0, max(1, table.metadata.num_rows)
        for batch in table.iter_batches(batch_size=ROWS_AT_A_TIME, columns=[column]):
            for value in batch.column(0).to_pylist():
                rows += 1
                yield value, size * rows // total


def read_arrow(path: Path, column: str) -> Iterator[tuple[Any, int]]:
    """The values of a column of an Arrow stream, or of an Arrow file, as in `read_parquet`."""
    pyarrow = _pyarrow(path)
    with _damage_named(path, pyarrow), open(path, "rb") as raw:
        is_file = raw.read(6) == b"ARROW1"
        raw.seek(0)
        ipc = pyarrow.ipc
        if is_file:
            reader = ipc.open_file(raw)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            batches = reader = ipc.open_stream(raw)
        _check_column(path, reader.schema.names, column)
        for batch in batches:
            position = raw.tell()
            for first in range(0, len(batch), ROWS_AT_A_TIME):
                rows = batch.column(column).slice(first, ROWS_AT_A_TIME)
                for value in rows.to_pylist():
                    yield value, position


def saved_files(folder: Path) -> list[Path] | None:
    """The data of a folder that `Dataset.save_to_disk` wrote, in order; None for another folder.

    Other .arrow files there are caches of what somebody once computed. ValueError for a damaged
    folder, and for a DatasetDict, of which only one split can be meant.
    """
    if (folder / SAVED_SPLITS).is_file():
        splits = _fields(folder / SAVED_SPLITS, "splits")
        raise ValueError(
            f"input is '{folder}'; it is a DatasetDict with the splits {', '.join(splits)}: name "
            f"one, such as {folder / str(splits[0])}"
        )
    if not ((folder / SAVED_DATASET).is_file() and (folder / SAVED_WITH).is_file()):
        return None
    entries = _fields(folder / SAVED_DATASET, "_data_files")
    files = [folder / str(entry["filename"]) for entry in entries]
    for file in files:
        if not file.is_file():
            raise ValueError(f"input is '{folder}'; {file.name} of its {SAVED_DATASET} is missing")
    return files


def _fields(path: Path, key: str) -> list[Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))[key]
        if not isinstance(values, list) or not values:
            raise TypeError(f"{key} is {values!r}")
        return values
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"input is '{path.parent}'; {path.name} is damaged ({error!r})") from error


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise ValueError(
            f"input is '{path}'; {path.suffix} needs: pip install 'distmoe[parquet]'"
        ) from error
    return pyarrow


@contextmanager
def _damage_named(path: Path, pyarrow: Any) -> Iterator[None]:
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"input is '{path}'; it is damaged or cannot be read ({error})") from error


def _check_column(path: Path, names: list[str], column: str) -> None:
    if column not in names:
        raise ValueError(f"{path}: --text-key is '{column}'; it has: {', '.join(names)}")
