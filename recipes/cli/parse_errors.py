"""What the parser of a command line says, in words that tell the mend.

jsonargparse speaks of classes and of arguments; a person typed options. Knows no command.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from draftsmith.recipes.cli.argv import Option

_EXPECTED = re.compile(r": Expected an? (?P<kind>.+?)\. Got value: (?P<value>.*)")
_KINDS = {"<class 'int'>": "a whole number", "<class 'float'>": "a number", "<class 'bool'>": "true or false",
          "<class 'str'>": "text"}  # fmt: skip
_LACKING = "the following arguments are required: "


def in_words(told: str, normal: Sequence[str], function: Callable[..., object], known: Mapping[str, Option]) -> str:
    """The parser's message `told` about the words `normal`, as a line for whoever typed them."""
    told = " ".join(re.sub(r'Parser key "([^"]+)":', r"--\1:", told).split())
    if told.startswith(_LACKING):
        lacking = [_written(name, known) for name in told.removeprefix(_LACKING).split(", ")]
        example = re.search(r"^ *(Example: .*)$", function.__doc__ or "", re.MULTILINE)
        return f"{' and '.join(lacking)} must be given" + (f". {example[1]}" if example else "")
    told = re.sub(r"^argument (--\w[\w.]*)\S*: expected one argument$", r"\1 needs a value behind it", told)
    told = _EXPECTED.sub(lambda found: f" takes {_kind(found['kind'])}, not {found['value']!r}", told)
    files = " ".join(word for word in normal if word.startswith("--config="))
    return told.replace("Problems parsing config", f"no YAML in {files}")


def _written(name: str, known: Mapping[str, Option]) -> str:
    """As the usage has it: positionals in capitals."""
    return name.upper() if name in known and known[name].positional else f"--{name}"


def _kind(kind: str) -> str:
    choices = re.findall(r"'([^']*)'", kind) if "Literal[" in kind else []
    return " or ".join(choices) if choices else _KINDS.get(kind, kind)
