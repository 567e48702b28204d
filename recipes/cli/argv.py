"""The normal form of a command line: every word becomes `--name=value`, so that one parser reads flags and YAML alike.

jsonargparse is strict where people are not, and by hand is only what it lacks: positionals that may also stand in a
configuration file, a bare `--json`, several values after one flag, hyphens for underscores, and a command line that
overrides `--config` wherever that stands. Knows signatures; knows no command, and leaves all checks of types to
jsonargparse.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from draftsmith.recipes.cli.renamed import refuse_old

# Options that every command has; the value says whether a word follows.
COMMON = {"config": True, "help": False, "print_config": False}
NONE: Mapping[str, str] = types.MappingProxyType({})

_OPTION = re.compile(r"--[A-Za-z]|-h$")


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One parameter: `flag` is a bool, `many` takes several values, `text` says that their elements are strings."""

    name: str
    positional: bool = False
    flag: bool = False
    many: bool = False
    text: bool = False


def shared(function: Callable[..., Any]) -> list[type]:
    """The classes of its positional-only parameters: their arguments are options of the command."""
    hints = get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    return [hints[each.name] for each in parameters if each.kind is each.POSITIONAL_ONLY]


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Every parameter that a command line can set, with its type resolved."""
    found: dict[str, inspect.Parameter] = {}
    sources: list[Any] = [*shared(function), function]
    for source in sources:
        hints = get_type_hints(source if source is function else source.__init__)
        for each in inspect.signature(source).parameters.values():
            if each.kind is not each.POSITIONAL_ONLY:
                kind = each.kind if source is function else each.KEYWORD_ONLY
                found[each.name] = each.replace(annotation=hints.get(each.name, str), kind=kind)
    return found


def options(function: Callable[..., Any]) -> dict[str, Option]:
    """Every option of `function`, those of dataclass parameters as `parameter.field`."""
    found: dict[str, Option] = {}
    for name, parameter in parameters(function).items():
        positional = parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is parameter.empty
        for option in _options_of(name, parameter.annotation, positional):
            found[option.name] = option
    return found


def _options_of(name: str, hint: Any, positional: bool) -> Iterator[Option]:
    if dataclasses.is_dataclass(hint):
        for field_name, field_hint in get_type_hints(hint).items():
            yield from _options_of(f"{name}.{field_name}", field_hint, False)
        return
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    lists = [member for member in members if (get_origin(member) or member) in (list, tuple, set, Sequence)]
    elements = {element for member in lists for element in get_args(member)} - {Ellipsis}
    yield Option(name, positional, bool in members, bool(lists), not elements <= {int, float, bool})


def normalise(words: Sequence[str], known: dict[str, Option], renamed: Mapping[str, str] = NONE) -> list[str]:
    """`words` as `--name=value` each: configuration files first, so that flags override them wherever they stand."""
    files: list[str] = []
    given: dict[str, list[str]] = {}
    loose: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            loose += rest
            break
        if not _OPTION.match(word):
            loose.append(word)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        name = "help" if word == "-h" else name.replace("-", "_")
        refuse_old(name, renamed)
        _check(name, known)
        values = [value] if equals else _take_values(name, rest, known)
        if name == "config":
            files += [f"--config={value}" for value in values] or ["--config"]
        elif name in known and known[name].many:
            given.setdefault(name, []).extend(values)
        else:
            given[name] = values
    for name, values in _place(loose, given, known):
        given[name] = values
    return files + [_written(name, values, known) for name, values in given.items()]


def _check(name: str, known: dict[str, Option]) -> None:
    """Refuse an unknown name. What comes after the dot is the parser's to judge, but for a group of known options."""
    name = name.removesuffix("+")
    if name in COMMON or name in known or name.partition(".")[0] in known:
        return
    # The same word within a group is meant more often than another that looks like it: --device, --machine.device.
    close = [option for option in known if option.rpartition(".")[2] == name.rpartition(".")[2]]
    close = close or difflib.get_close_matches(name, [*known, *COMMON], n=1)
    raise ValueError(f"unknown option --{name}" + (f"; did you mean --{close[0]}?" if close else "; --help lists all"))


def _take_values(name: str, rest: list[str], known: dict[str, Option]) -> list[str]:
    """Take from `rest` the words that belong to option `name`."""
    if not COMMON.get(name, True):
        return []
    option = known.get(name, Option(name))
    taken: list[str] = []
    while rest and rest[0] != "--" and not _OPTION.match(rest[0]):
        if option.flag and rest[0].lower() not in ("true", "false"):
            break
        taken.append(rest.pop(0))
        if not option.many:
            break
    return taken or (["true"] if option.flag else [])


def _place(loose: list[str], given: dict[str, list[str]], known: dict[str, Option]) -> Iterator[tuple[str, list[str]]]:
    """Words without a flag fill the positional parameters in order; a list takes what the others leave."""
    waiting = [option for option in known.values() if option.positional and option.name not in given]
    for index, option in enumerate(waiting):
        after = len(waiting) - index - 1
        count = max(len(loose) - after, 0) if option.many else 1
        taken, loose = loose[:count], loose[count:]
        if taken:
            yield option.name, taken
    if loose:
        raise ValueError(f"unexpected argument {loose[0]!r}; --help lists what may be given")


def _written(name: str, values: list[str], known: dict[str, Option]) -> str:
    if not values:
        return f"--{name}"
    option = known.get(name, Option(name))
    whole = len(values) == 1 and (values[0].startswith("[") or values[0] == "null")
    if not option.many or whole:
        return f"--{name}={values[-1]}"
    elements = [json.dumps(value, ensure_ascii=False) for value in values] if option.text else values
    return f"--{name}=[{', '.join(elements)}]"
