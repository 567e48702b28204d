"""All commands together: an example each, a heading each, one name and one type for one thing; and no stilted words."""

import inspect
import re
import shlex
from collections import defaultdict
from pathlib import Path

import pytest

from draftsmith.recipes.cli.argv import normalise, options
from draftsmith.recipes.cli.main import COMMANDS, build_parser, load, run

ROOT = Path(__file__).resolve().parents[2]
# Each of these has a plainer word.
REFUSED = ("told", "so many", "likewise", "whoever", "speaks", "stands in", "not known here")
# Groups of commands, one line each in the overview.
GROUPS = ("train", "store")


def error_of(capsys):
    """The one line on stderr; nothing on stdout."""
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    return line


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_has_an_example_that_parses(name, capsys):
    assert run([*name.split(), "--help"]) == 0
    (line,) = re.findall(r"^Example: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert line.startswith(f"draftsmith {name}")
    function = load(COMMANDS[name])
    known = options(function)
    words = shlex.split(line.removeprefix(f"draftsmith {name}"))
    parser = build_parser(name, function, known)
    parser.instantiate(parser.parse_args(normalise(words, known)))


def test_the_overview_fits_a_screen_and_puts_every_command_under_a_heading(capsys):
    assert run(["--help"]) == 0
    overview = capsys.readouterr().out
    assert len(overview.splitlines()) <= 40
    assert max(map(len, overview.splitlines())) <= 80
    blocks = overview.split("\n\n")[1:-1]
    assert len(blocks) == 6
    assert all(not block.startswith(" ") for block in blocks)
    lines = dict(re.split(r" {2,}", line.strip()) for block in blocks for line in block.splitlines()[1:])
    shown = {f"{name} {member}" for name in GROUPS for member in lines.pop(name).split(", ")}
    assert shown | set(lines) == {" ".join(name.split()[:2]) for name in COMMANDS}


@pytest.mark.parametrize("group", GROUPS)
def test_the_overview_of_a_group_lists_its_commands(group, capsys):
    assert run([group, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    shown = {re.split(r" {2,}", line.strip())[0] for line in lines if line.startswith("  ")}
    assert shown == {name for name in COMMANDS if name.startswith(f"{group} ")}


def test_no_study_is_a_command():
    assert [name for name, command in COMMANDS.items() if "studies" in command.function] == []


# What an option of a name takes, apart from None, defaults and ranges (tests/recipes/cli/test_ranges.py).
def test_an_option_is_of_one_type_in_every_command():
    types_of = defaultdict(dict)
    for name, command in COMMANDS.items():
        for option in options(load(command)).values():  # those of a group by its name and their own
            kind = re.sub(r" \| None$", "", inspect.formatannotation(option.hint))
            kind = re.sub(r"^(typing\.)?Literal\[.*$", "str", kind).replace("collections.abc.Sequence[", "list[")
            kind = re.sub(r"(\w+\.)*(IntFrom[01])\b", "int", kind)
            kind = re.sub(r"(\w+\.)*(FloatAbove0|FloatFrom0|From0To1|Above0To1)\b", "float", kind)
            types_of[option.name].setdefault(kind, name)
    differing = {name: kinds for name, kinds in types_of.items() if len(kinds) > 1}
    assert differing == {}


def test_a_thing_has_one_name_in_every_command():
    """The words that other tools or earlier versions have for what has a name here."""
    others = {"files", "input", "inputs", "model_path", "base_model", "output", "output_dir", "out_dir", "new_tokens",
              "max_tokens", "bs", "rounds", "num_samples", "samples", "n", "lr", "learning_rate", "log", "verbose",
              "cost_seconds", "split_name", "random_seed", "temp", "tok", "prompts"}  # fmt: skip
    used = {option for command in COMMANDS.values() for option in options(load(command))}
    assert used & others == set()


def test_questions_are_given_as_data_but_where_they_belong_to_answers_in_another_file():
    assert [name for name, command in COMMANDS.items() if "questions" in options(load(command))] == [
        "replay",
        "forecast",
    ]
    assert all("data" in options(load(COMMANDS[name])) for name in ("replay", "forecast"))


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if name != "quickstart"])
def test_every_command_prints_json_where_it_is_asked(name):
    assert options(load(COMMANDS[name]))["json"].flag


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("device", "machine.device"),
        ("lr", "optim.lr"),
        ("batch_size", "optim.batch_size"),
        ("optimiser.lr", "optim.lr"),
    ],
)
def test_an_option_that_stands_in_a_group_is_found_by_its_own_word(word, meant, capsys):
    assert run(["train", "sft", f"--{word}", "1"]) == 2
    assert error_of(capsys) == f"draftsmith train sft: unknown option --{word}; did you mean --{meant}?"


@pytest.mark.parametrize("words", REFUSED)
def test_code_and_recipes_use_no_word_that_the_style_refuses(words):
    pattern = re.compile(r"(?<![a-z])" + words.replace(" ", r"[\s#_]+") + r"(?![a-z])", re.IGNORECASE)
    found = []
    for folder in ("infer", "retrieval", "train", "recipes"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".sh", ".yaml"):
                text = path.read_text(encoding="utf-8")
                lines = (text.count("\n", 0, match.start()) + 1 for match in pattern.finditer(text))
                found += [f"{path.relative_to(ROOT)}:{line}" for line in lines]
    assert found == []
