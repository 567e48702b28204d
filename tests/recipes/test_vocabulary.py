"""All commands together: an example each, a heading each, one name and one type for one thing."""

import inspect
import re
import shlex
from collections import defaultdict

import pytest

from draftsmith.recipes.cli.argv import normalise, options, parameters
from draftsmith.recipes.cli.main import COMMANDS, build_parser, load, run
from draftsmith.recipes.cli.renamed import RENAMED


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


def test_every_command_stands_under_a_heading_of_the_overview(capsys):
    assert run(["--help"]) == 0
    blocks = capsys.readouterr().out.split("\n\n")[1:-1]
    assert len(blocks) == 7
    shown = {line.strip().split("  ")[0] for block in blocks for line in block.splitlines()[1:]}
    assert shown == set(COMMANDS)
    assert all(not block.startswith(" ") for block in blocks)


# What an option of a name takes, None and defaults apart. `acceptance` of `plan bench` is one share by its purpose.
def test_an_option_is_of_one_type_in_every_command():
    types_of = defaultdict(dict)
    for name, command in COMMANDS.items():
        for parameter in parameters(load(command)).values():
            kind = re.sub(r" \| None$", "", inspect.formatannotation(parameter.annotation))
            kind = re.sub(r"^(typing\.)?Literal\[.*$", "str", kind).replace("collections.abc.Sequence[", "list[")
            types_of[parameter.name].setdefault(kind, name)
    differing = {name: kinds for name, kinds in types_of.items() if len(kinds) > 1}
    assert differing.keys() == {"acceptance"}, differing


def test_a_thing_has_one_name_in_every_command():
    """The words that other tools or earlier versions have for what has a name here."""
    others = {"files", "input", "inputs", "model_path", "base_model", "output", "output_dir", "out_dir", "new_tokens",
              "max_tokens", "bs", "rounds", "num_samples", "samples", "n", "lr", "learning_rate", "log", "verbose",
              "cost_seconds", "split_name", "random_seed", "temp", "tok", "questions", "prompts"}  # fmt: skip
    used = {option for command in COMMANDS.values() for option in options(load(command))}
    assert used & others == set()


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if name != "quickstart"])
def test_every_command_prints_json_where_it_is_asked(name):
    assert options(load(COMMANDS[name]))["json"].flag


@pytest.mark.parametrize(("name", "old"), [(name, old) for name, olds in RENAMED.items() for old in olds])
def test_an_old_name_is_refused_with_the_new_one(name, old, tmp_path, capsys):
    new = re.match(r"--(\w+)", RENAMED[name][old])[1]
    known = options(load(COMMANDS[name]))
    assert old not in known
    assert new in known
    assert run([*name.split(), f"--{old}", "1"]) == 2
    assert error_of(capsys) == f"draftsmith {name}: --{old} has another name now: {RENAMED[name][old]}"
    config = tmp_path / "old.yaml"
    config.write_text(f"{old}: 1\n")
    assert run([*name.split(), "--config", str(config)]) == 2
    assert f"--{old} has another name now: " in error_of(capsys)


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
