"""Every numeric option has a range, which its type states, the parser checks and the help shows."""

from __future__ import annotations

import re
import shlex
from typing import get_args

import pytest

from draftsmith.recipes.cli.argv import options
from draftsmith.recipes.cli.main import COMMANDS, load, run
from draftsmith.recipes.cli.ranges import WORDS

DECODE = "--target T --data F"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"bench {DECODE} --batch_size 0", "--batch_size takes a whole number of at least 1, not '0'"),
        (f"bench {DECODE} --batch_size 2.5", "--batch_size takes a whole number of at least 1, not '2.5'"),
        (f"bench {DECODE} --batch_size=", "--batch_size takes a whole number of at least 1, not ''"),
        (f"bench {DECODE} --limit 0", "--limit takes a whole number of at least 1, not '0'"),
        (f"bench {DECODE} --limit x", "--limit takes a whole number of at least 1, not 'x'"),
        (f"bench {DECODE} --warmup -1", "--warmup takes a whole number of at least 0, not '-1'"),
        (f"bench {DECODE} --min_distinct 2", "--min_distinct takes a number from 0 to 1, not '2'"),
        (f"bench {DECODE} --top_p nan", "--top_p takes a number above 0, at most 1, not 'nan'"),
        (f"bench {DECODE} --temperature inf", "--temperature takes a number of at least 0, not 'inf'"),
        (f"bench {DECODE} --repetition_penalty 0", "--repetition_penalty takes a number above 0, not '0'"),
        (f"bench {DECODE} --seed -1", "--seed takes a whole number of at least 0, not '-1'"),
        (f"bench {DECODE} --seed {1 << 70}", "--seed takes a whole number"),
        (f"bench {DECODE} --json=perhaps", "--json takes true or false, not 'perhaps'"),
        (f"calibrate {DECODE} --drafters pld --exits 0", "--exits takes one or more values, each a whole number of at"),
        (f"generate {DECODE} --top_k -1", "--top_k takes a whole number of at least 0, not '-1'"),
        (f"generate {DECODE} --stop_ids -4", "--stop_ids takes one or more values, each a whole number of at least 0"),
        ("replay --data F --tokenizer T --drafters pld --nodes 0", "--nodes takes a whole number of at least 1"),
        ("replay --data F --tokenizer T --drafters pld --batch_sizes 1 0", "--batch_sizes takes one or more values"),
        ("plan --target T --lengths 0", "--lengths takes one or more values, each a whole number of at least 1"),
        ("data F --show -1", "--show takes a whole number of at least 0, not '-1'"),
        ("data F --on_bad no", "--on_bad takes raise or skip, not 'no'"),
        ("data F --template_kwargs 3", "--template_kwargs takes NAME: VALUE pairs"),
        ("store remove S --keep_days -5", "--keep_days takes a number of at least 0, not '-5'"),
        ("store merge S --chunk_tokens 0", "--chunk_tokens takes a whole number of at least 1"),
        ("store build dresd --target T --data F --out O --dims 0", "--dims takes a whole number of at least 1"),
        ("export C --out O --engine tgi", "--engine takes vllm or sglang or speculators or transformers, not 'tgi'"),
        ("quickstart --seed -1", "--seed takes a whole number of at least 0"),
    ],
)
def test_a_value_out_of_range_is_refused_by_the_parser(line, expected, capsys):
    assert run(shlex.split(line)) == 2
    (printed,) = capsys.readouterr().err.splitlines()
    assert expected in printed
    assert len(printed) < 200


def _bare_numbers(hint) -> bool:
    return hint in (int, float) or any(_bare_numbers(member) for member in get_args(hint))


# The groups of training options (text, optim, machine, watch) are dataclasses of draftsmith.train, which checks them.
@pytest.mark.parametrize("name", [name for name in COMMANDS if not name.startswith("train")])
def test_every_numeric_option_has_a_range(name):
    assert [option.name for option in options(load(COMMANDS[name])).values() if _bare_numbers(option.hint)] == []


def test_the_help_shows_the_ranges(capsys):
    assert run(["bench", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"--max_new_tokens \S+ token limit of each answer \(one per turn\)\. \(type: IntFrom1", shown)
    assert "(type: From0To1, default: 0.0)" in shown


def test_every_range_has_words_for_messages():
    from draftsmith.recipes.cli import ranges

    declared = {value for value in vars(ranges).values() if isinstance(value, type) and issubclass(value, (int, float))}
    assert declared == set(WORDS)
