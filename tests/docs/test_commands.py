"""Every command of the documentation is one that works."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import checks
import pytest
from pages import PAGES, Block, Word, blocks, code_words, name
from shell import commands, lines, split

from distmoe.config.keys import key_types
from distmoe.launch.cli import COMMANDS
from distmoe.launch.cli import main as distmoe_main

# The commands of the tutorial run in order, in test_tutorial.py.
OTHERS = [page for page in PAGES if page.name != "tutorial.md"]
BLOCKS = [block for page in OTHERS for block in blocks(page, "sh")]
OPTION = re.compile(r"(?<![\w-])--[a-z][\w.-]*")
# In the text, options of other people's programs.
FOREIGN = {"--map-by", "--mpi", "--exclusive", "--rdzv-conf", "--nnodes", "--test-only"}
FOREIGN |= {"--index-url", "--cpus-per-task", "--gpus-per-task", "--batch", "--signal"}
FOREIGN |= {"--overlap-moe-expert-parallel-comm", "--delay-wgrad-compute", "--routing"}
FOREIGN |= {"--reset-attention-mask", "--eod-mask-loss"}
FOREIGN |= {option for known in checks.OPTIONS.values() for option in known}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{name(block.page)}:{block.line}")
def test_commands_are_understood(
    block: Block, workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workshop)
    found = list(commands(block))
    assert found, "a block without a command"
    for command in found:
        checks.check(command)


WRONG = {
    "a program in no class": ("frobnicate configs/tiny.toml", "no class for 'frobnicate'"),
    "behind a pipe": ("distmoe config configs/tiny.toml | frobnicate", "'frobnicate'"),
    "a file": ("distmoe train configs/no.toml", "there is no configs/no.toml"),
    "a setting": ("distmoe train configs/tiny.toml --train.step 5", "did you mean 'train.steps'"),
    "a world": (
        "torchrun --nproc-per-node=3 -m distmoe train configs/eight_gpu.toml",
        "parallel.ep is 8",
    ),
    "srun's option": ("srun --gpus 8 distmoe train configs/tiny.toml", "srun has no --gpus"),
    "an argument of a command": ("distmoe data prepare corpus/", "--out"),
    "an option of a tool": ("python tools/soak_layer.py --step 3.5", "must be an integer"),
    "a setting that a tool hands on": (
        "python tools/check_throughput.py configs/tiny.toml --train.step=3",
        "did you mean 'train.steps'",
    ),
    "a target": ("make tea", "no such targets: ['tea']"),
    "extras": ("pip install 'distmoe[gpu]'", "no such extras: {'gpu'}"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_is_seen(
    case: str, workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workshop)
    text, words = WRONG[case]
    *before, last = split(Word(workshop / "page.md", 1, text))
    for command in before:
        checks.check(command)
    with pytest.raises(AssertionError) as refused:
        checks.check(last)
    assert words in str(refused.value)


def test_a_block_is_read_as_a_shell_reads_it(tmp_path: Path) -> None:
    text = """# a comment
A=1 b 'c  d' \\
    --e   # the end
cat > f <<'END'
g | h
END
i | j && k > l
"""
    block = Block(tmp_path / "page.md", 10, "sh", text)
    found = [(command.words, command.outputs, command.where.line) for command in commands(block)]
    assert found == [
        (("b", "c  d", "--e"), (), 11),
        (("cat",), ("f",), 13),
        (("i",), (), 16),
        (("j",), (), 16),
        (("k",), ("l",), 16),
    ]
    assert [line.text for line in lines(block)][1] == "cat > f <<'END'\ng | h\nEND"


@pytest.fixture(scope="module")
def options(workshop: Path) -> dict[str, set[str]]:
    """What may follow each of our programs, by what they say of themselves; and anything, by ""."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workshop)
        for command in COMMANDS:
            text = said(lambda c=command: distmoe_main([c, "--help"]))
            found[f"distmoe {command}"] = text
            # Commands of the command, such as inspect of data.
            for action in "".join(re.findall(r"^usage:.*\{([\w,-]+)\}", text)).split(","):
                words = [command, action, "--help"]
                found[f"distmoe {command} {action}"] = said(lambda w=words: distmoe_main(w))
        for tool in sorted(Path("tools").glob("*.py")):
            if "argparse" in tool.read_text():
                found[f"python {tool}"] = said(lambda t=tool: checks.run_tool([str(t), "--help"]))
    of_all = FOREIGN | {f"--{key}" for key in key_types()}
    of_all |= set(OPTION.findall(said(lambda: distmoe_main(["--help"]))))
    known = {program: set(OPTION.findall(text)) | of_all for program, text in found.items()}
    return known | {"": set().union(*known.values())}


def said(call: object) -> str:
    """What a program prints when it is asked for help."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        call()  # type: ignore[operator]
    return output.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_and_options_in_the_text_exist(page: Path, options: dict[str, set[str]]) -> None:
    for word in code_words(page):
        command = re.match(r"distmoe ([a-z]+)\b", word.text)
        assert not command or command[1] in COMMANDS, f"{name(page)}:{word.line}: {word.text}"
        programs = [program for program in options if word.text.startswith(program)]
        known = options[max(programs, key=len)]
        for option in OPTION.findall(word.text):
            asked = re.sub(r"\.no-", ".", option)
            assert asked in known, f"{name(page)}:{word.line}: {word.text}: no option {option}"
