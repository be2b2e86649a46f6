"""The commands of a block: what a shell would start, without a shell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from pages import Block, Word

HERE_DOCUMENT = re.compile(r"<<\s*'?(\w+)'?\s*$")
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")
BETWEEN = {"|", "||", "&&", "&", ";"}


@dataclass(frozen=True)
class Command:
    """``words`` without assignments and redirections; ``outputs``: files behind `>`."""

    where: Word
    words: tuple[str, ...]
    outputs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.where.page.name}:{self.where.line}: {shlex.join(self.words)}"


def lines(block: Block) -> Iterator[Word]:
    """Whole commands as a shell reads them: continued lines are joined, and the text of a here
    document stays with its command."""
    rows = iter(enumerate(block.text.splitlines(), block.line))
    for number, row in rows:
        text = row
        while text.endswith("\\"):
            text = f"{text[:-1]} {next(rows)[1].strip()}"
        if match := HERE_DOCUMENT.search(text):
            for _, row in rows:
                text += f"\n{row}"
                if row == match[1]:
                    break
        if text.strip() and not text.lstrip().startswith("#"):
            yield Word(block.page, number, text)


def commands(block: Block) -> Iterator[Command]:
    """The simple commands of a block, those of a pipe one by one."""
    for line in lines(block):
        yield from split(line)


def split(line: Word) -> Iterator[Command]:
    """The simple commands of one line."""
    first = HERE_DOCUMENT.sub("", line.text.partition("\n")[0])
    lexer = shlex.shlex(first, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    outputs: list[str] = []
    for token in (*lexer, ";"):
        if token in BETWEEN:
            if words:
                yield Command(line, tuple(words), tuple(outputs))
            words, outputs = [], []
        elif words and words[-1] == ">":
            words.pop()
            outputs.append(token)
        elif words or not ASSIGNMENT.fullmatch(token):
            words.append(token)
