"""A command that takes another's options has them in its signature, on its command line and in its help."""

import inspect

import pytest

from draftsmith.recipes.cli.argv import options
from draftsmith.recipes.cli.main import build_parser
from draftsmith.recipes.cli.options_of import with_options_of
from draftsmith.train.run.settings import Optim


def first(*, out: str, steps: int | None = None, depth: int, optim: Optim = Optim(), json: bool = False) -> dict:
    """Do the first thing.

    Args:
        out: where it goes.
        steps: how many,
            in all.
        depth: of the first.
        optim: how weights move.
        json: print it.
    """


@with_options_of(first)
def second(*, depth: list[int], width: float = 0.5, **given) -> dict:
    """Do the second thing, twice.

    Args:
        depth: of the second.
        width: its own.
    """
    return {"depth": depth, "width": width, **given}


def parse(*words):
    parser = build_parser("second", second, options(second))
    return vars(parser.instantiate(parser.parse_args(list(words))))


def test_its_signature_is_the_others_with_its_own_in_place_and_behind():
    parameters = inspect.signature(second).parameters
    assert list(parameters) == ["out", "steps", "depth", "optim", "json", "width"]
    assert parameters["depth"].default is inspect.Parameter.empty
    assert options(second)["depth"].many
    assert "optim.lr" in options(second)


def test_the_command_line_is_typed_by_both_and_reaches_the_function():
    given = parse("--out=a", "--steps=3", "--depth=[1, 2]", "--optim.lr=0.1")
    given.pop("config")
    assert second(**given) == {
        "out": "a", "steps": 3, "depth": [1, 2], "optim": Optim(lr=0.1), "json": False, "width": 0.5,
    }  # fmt: skip
    with pytest.raises(Exception, match="steps"):
        parse("--out=a", "--depth=[1]", "--steps=many")


def test_the_help_tells_every_option_once_and_its_own_way():
    told = second.__doc__
    assert told.startswith("Do the second thing, twice.\n\n    Args:\n        out: where it goes.\n")
    assert "steps: how many,\n            in all.\n" in told
    assert "of the second" in told
    assert "of the first" not in told
    assert told.rstrip().endswith("width: its own.")
    text = build_parser("second", second, options(second)).format_help()
    assert "in all." in text
    assert "its own." in text
