"""The prepared data against the settings: it is there, long enough, and fits the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from distmoe.config.corpora import corpora
from distmoe.config.data_sizes import DataSizes, read_data_sizes
from distmoe.config.errors import ConfigError
from distmoe.config.sample_ranges import sample_ranges
from distmoe.config.schema import Config


def data_problems(config: Config) -> Iterator[str]:
    """What is wrong with the folders of data.path or data.mix, and with data.skip, a line each."""
    key = "data.mix" if config.data.mix else "data.path"
    try:
        folders = [corpus.path for corpus in corpora(config.data)]
    except ConfigError as error:
        yield from error.problems
        return
    sizes = {}
    for folder in folders:
        try:
            sizes[folder] = read_data_sizes(folder, key)
        except ConfigError as error:
            yield from error.problems
    try:
        sample_ranges(config.data.skip)
    except ConfigError as error:
        yield from error.problems
    if config.data.document_mask and config.data.seq_len < 2:
        yield "data.seq_len is 1; it must be at least 2 with data.document_mask"
    yield from _other_tokenizers(sizes)
    for folder, size in sizes.items():
        yield from _folder_problems(config, key, folder, size)


def _other_tokenizers(sizes: Mapping[str, DataSizes]) -> Iterator[str]:
    """Folders whose tokens mean something else than the first one's."""
    first = next(iter(sizes), "")
    for folder, size in sizes.items():
        if size.tokenizer_sha256 != sizes[first].tokenizer_sha256:
            yield (
                f"data.mix has '{folder}', whose tokenizer.json (sha256 "
                f"{size.tokenizer_sha256[:12]}...) is not that of '{first}' "
                f"({sizes[first].tokenizer_sha256[:12]}...); all must have the same: "
                f"distmoe data prepare ... --tokenizer {first}/tokenizer.json"
            )
        elif size.eod_id != sizes[first].eod_id:
            yield (
                f"data.mix has '{folder}', whose documents end with the token {size.eod_id}; it "
                f"must be {sizes[first].eod_id}, as in '{first}': distmoe data prepare ... "
                "--eod-token"
            )


def _folder_problems(config: Config, key: str, folder: str, sizes: DataSizes) -> Iterator[str]:
    if config.model.vocab_size < sizes.vocab_size:
        yield (
            f"model.vocab_size is {config.model.vocab_size}; it must be 0 or at least the "
            f"{sizes.vocab_size} tokens of the tokenizer in {folder}"
        )
    batch = config.train.global_batch_size
    # A corpus of a mix may be small: it is read again as often as needed.
    trained = (1, "a mix") if config.data.mix else (batch, "train.global_batch_size")
    validated = (
        config.train.validation_batches * batch,
        "train.validation_batches * train.global_batch_size",
    )
    for split, tokens, (needed, why) in (
        ("training", sizes.train_tokens, trained),
        ("validation", sizes.validation_tokens, validated),
    ):
        # A sample is seq_len inputs and the token after them, which begins the next sample.
        samples = max(0, tokens - 1) // config.data.seq_len
        if samples < needed:
            yield (
                f"{key} is '{folder}'; its {split} split has {samples} sequences of "
                f"data.seq_len ({config.data.seq_len}) and {why} needs {needed}; "
                "prepare more text, or lower one of these"
            )
