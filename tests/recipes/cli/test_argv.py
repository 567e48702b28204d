"""The arguments of a positional-only parameter's class are options of the command, in its help too."""

import sys
import types
from dataclasses import dataclass

from draftsmith.recipes.cli.argv import options, parameters
from draftsmith.recipes.cli.main import Command, build_parser, run
from draftsmith.train.run.config import Optim


@dataclass(frozen=True)
class First:
    """What every command of a family takes.

    Args:
        out: where it goes.
        steps: how many,
            in all.
        optim: the optimiser.
    """

    out: str
    steps: int | None = None
    optim: Optim = Optim()


class Second:
    """What one command of the family takes.

    Args:
        depth: of the second.
        width: its own.
    """

    def __init__(self, depth: list[int], width: float = 0.5) -> None:
        self.depth = depth
        self.width = width


def second(first: First, second: Second, /, *, json: bool = False) -> dict:
    """Do the second thing, twice.

    Args:
        json: print it.
    """
    return {"first": first, "depth": second.depth, "width": second.width, "json": json}


def test_the_options_are_those_of_the_classes_and_then_the_functions_own():
    assert list(parameters(second)) == ["out", "steps", "optim", "depth", "width", "json"]
    assert parameters(second)["depth"].default is parameters(second)["out"].default
    known = options(second)
    assert known["depth"].many
    assert not known["out"].positional
    assert "optim.lr" in known


def test_the_command_line_is_typed_by_all_and_reaches_the_function(monkeypatch, capsys):
    calls = []

    def noted(first: First, made: Second, /, *, json: bool = False) -> None:
        calls.append(second(first, made, json=json))

    module = types.ModuleType("fake_second")
    module.second = noted
    monkeypatch.setitem(sys.modules, "fake_second", module)
    table = {"second": Command("fake_second:second", "twice")}
    assert run(["second", "--out=a", "--steps=3", "--depth", "1", "2", "--optim.lr=0.1"], table) == 0
    assert calls == [{"first": First("a", 3, Optim(lr=0.1)), "depth": [1, 2], "width": 0.5, "json": False}]
    assert run(["second", "--out=a", "--depth=[1]", "--steps=many"], table) == 2
    assert "second: --steps takes a whole number, not 'many'" in capsys.readouterr().err


def test_the_help_lists_every_option_once_and_its_own_way():
    text = build_parser("second", second, options(second)).format_help()
    for words in (
        "Do the second thing, twice.",
        "where it goes.",
        "how many,",
        "of the second",
        "its own.",
        "print it.",
    ):
        assert text.count(words) == 1, words
