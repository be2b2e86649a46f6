"""What the documentation refers to is there: pages and their headings, settings, files, tests."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
from pages import PAGES, ROOT, Block, PageError, anchors, blocks, code_words, links, name

from distmoe.config import load_config
from distmoe.config.keys import key_types, sections

SECTIONS = sorted(section for section in sections() if section and "." not in section)
SETTING = re.compile(rf"(?<![\w./'-])(?:--)?((?:{'|'.join(SECTIONS)})(?:\.\w+)+)")
# Names of other things that begin as a section is called.
NO_SETTINGS = (
    "model.embedding.weight",
    "deepspeed.moe.",
    "deepspeed.module_inject.",
    "deepspeed.launcher.",
)
SUFFIXES = ("py", "sh", "sbatch", "toml", "json", "md", "png")
PATH = re.compile(rf"[\w.{{}},*-]+(?:/[\w.{{}},*-]+)+\.(?:{'|'.join(SUFFIXES)})")
SCRIPT = re.compile(r"\w+\.(?:py|sh|sbatch)")
# Files of a run, whose names begin as sections are called.
OF_A_RUN = ("metrics.jsonl", "train.sbatch")
TEST = re.compile(r"test_\w+")
# Files of a reader, and what a page leaves open.
READERS = {"layer.py", "exported/config.json"}
TESTS = {
    node.name
    for path in (ROOT / "tests").rglob("test_*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
}
SCRIPTS = {
    path.name
    for folder in ("distmoe", "kernels", "launch", "tests", "tools")
    for path in (ROOT / folder).rglob("*.*")
}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        where, _, anchor = link.text.partition("#")
        target = (page.parent / where).resolve() if where else page
        assert target.exists(), f"{name(page)}:{link.line}: {link.text}: no such file"
        if anchor:
            known = anchors(target)
            assert anchor in known, f"{name(page)}:{link.line}: {link.text}: no such heading"


def test_every_page_is_linked() -> None:
    reached = {
        (page.parent / link.text.partition("#")[0]) for page in PAGES for link in links(page)
    }
    alone = set(PAGES) - {path.resolve() for path in reached} - {ROOT / "README.md"}
    assert not alone


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_settings_exist(page: Path) -> None:
    known = {*key_types(), *sections()}
    for word in code_words(page):
        # A switch is --metrics.no-tensorboard, too.
        for found in SETTING.finditer(word.text.replace(".no-", ".")):
            if found[1] in OF_A_RUN or found[1].startswith(NO_SETTINGS):
                continue
            assert found[1] in known, f"{name(page)}:{word.line}: no setting {found[1]}"


@pytest.mark.parametrize(
    "block",
    [block for page in PAGES for block in blocks(page, "toml")],
    ids=lambda block: f"{name(block.page)}:{block.line}",
)
def test_settings_in_blocks_are_right(
    block: Block, workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workshop)
    tomllib.loads(block.text)
    path = workshop / "block.toml"
    path.write_text(block.text)
    load_config(path)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_tests_exist(page: Path) -> None:
    for word in code_words(page):
        where = f"{name(page)}:{word.line}: {word.text}"
        if word.text in READERS or re.search(r"\b(NAME|THEME)", word.text):
            continue
        if PATH.fullmatch(word.text) and "{" not in word.text:
            assert _exists(page, word.text), f"{where}: no such file"
        elif SCRIPT.fullmatch(word.text):
            assert word.text in SCRIPTS, f"{where}: no such file"
        elif TEST.fullmatch(word.text):
            assert word.text in TESTS, f"{where}: no such test"


def _exists(page: Path, text: str) -> bool:
    """Paths are from the repository, from the package, or from the page; those in folders that are
    none of ours are the reader's."""
    homes = (ROOT, ROOT / "distmoe", page.parent)
    ours = any((home / text.partition("/")[0]).is_dir() for home in homes)
    return not ours or any(any(home.glob(text)) for home in homes)


def test_every_note_of_the_design_names_its_tests() -> None:
    text = (ROOT / "docs/design.md").read_text().partition("\n## The data path\n")[2]
    notes = re.split(r"^#+ ", text, flags=re.MULTILINE)
    assert len(notes) > 20
    for note in notes:
        _, _, tests = note.partition("*Tested*:")
        assert re.search(r"`tests?[/_]", tests), note.partition("\n")[0] or "The data path"


WRONG = {
    "a block in no language": ("text\n```\nls\n```\n", ":2: block in ''"),
    "an indented block": ("text\n\n    ls\n", ":3: an indented block"),
    "a block without an end": ("```sh\nls\n", ":1: a block without an end"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_page_keeps_to_the_convention(case: str, tmp_path: Path) -> None:
    text, words = WRONG[case]
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(PageError) as refused:
        blocks(page)
    assert words in str(refused.value)


def test_a_page_is_read(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b` c!\n\n```sh\n`x` [y](z)\n```\n## A b c\ntext `a\nb` [in\ntext](other.md#d) `e|f`\n"
        "[away](https://a.b)\n"
    )
    assert anchors(page) == {"a-b-c", "a-b-c-1"}
    assert [(word.line, word.text) for word in code_words(page)] == [
        (1, "b"),
        (7, "a b"),
        (9, "e|f"),
    ]
    assert [(link.line, link.text) for link in links(page)] == [(8, "other.md#d")]
