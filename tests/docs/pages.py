"""The pages of the documentation: their blocks, headings, links and words in code.

One convention: a block is fenced and names its language. `sh` holds commands, `python` runs, `toml`
holds settings of a run, and `text` is output, or what else nobody types.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("sh", "python", "toml", "text")
FENCE = "```"
CODE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)*)`(?!`)")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


class PageError(ValueError):
    """A page that does not keep to the convention."""


@dataclass(frozen=True)
class Block:
    """A fenced block; ``line`` is that of its first line in ``page``."""

    page: Path
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Word:
    """Something that a page says at ``line``: code, or where a link leads."""

    page: Path
    line: int
    text: str


def name(page: Path) -> str:
    """How a page is called in messages."""
    return str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks in one of ``languages``, or all; PageError for a block that has none."""
    found = [part for part in _parts(page) if isinstance(part, Block)]
    return [block for block in found if not languages or block.language in languages]


def code_words(page: Path) -> Iterator[Word]:
    """What is set in code inside of the text."""
    text = _prose(page)
    for match in CODE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Word(page, line, match[1].replace("\n", " ").replace("\\|", "|"))


def links(page: Path) -> Iterator[Word]:
    """Where links and pictures lead, but for other sites."""
    text = CODE.sub(lambda match: "\n" * match[0].count("\n"), _prose(page))
    for match in LINK.finditer(text):
        if "://" not in match[1]:
            yield Word(page, text.count("\n", 0, match.start()) + 1, match[1])


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    seen: Counter[str] = Counter()
    found = set()
    for match in re.finditer(r"^#+ (.*)$", _prose(page), re.MULTILINE):
        # The text of a link, without its target and marks.
        heading = LINK.sub(lambda link: link[0][1:].partition("]")[0], match[1])
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def _prose(page: Path) -> str:
    """The page with empty lines in place of its blocks."""
    lines = []
    for part in _parts(page):
        lines.append(part if isinstance(part, str) else "\n" * (part.text.count("\n") + 1))
    return "\n".join(lines)


def _parts(page: Path) -> Iterator[str | Block]:
    """Lines of text, and blocks."""
    lines = page.read_text().split("\n")
    number, before = 0, ""
    while number < len(lines):
        line = lines[number]
        number += 1
        if line.startswith(FENCE):
            language = line.removeprefix(FENCE)
            if language not in LANGUAGES:
                known = ", ".join(LANGUAGES)
                raise PageError(f"{name(page)}:{number}: block in '{language}'; known: {known}")
            if FENCE not in lines[number:]:
                raise PageError(f"{name(page)}:{number}: a block without an end")
            end = lines.index(FENCE, number)
            yield Block(page, number + 1, language, "\n".join([*lines[number:end], ""]))
            number, line = end + 1, FENCE
        elif line.startswith("    ") and not before:
            raise PageError(f"{name(page)}:{number}: an indented block; use {FENCE}sh or another")
        else:
            yield line
        before = line
