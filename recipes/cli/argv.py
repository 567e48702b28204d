"""Command lines for jsonargparse: `normalise` turns every word into `--name=value`, `explain` rewrites parser errors.

What jsonargparse lacks: positionals that may also come from a configuration file, a bare `--json`, several values after
one flag, hyphens for underscores, and flags that override `--config` wherever it stands. It does all checks of types.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from draftsmith.recipes.cli.ranges import WORDS

# Options of every command; the value says whether a word follows.
COMMON = {"config": True, "help": False, "print_config": False}

_OPTION = re.compile(r"--[A-Za-z]|-h$")
# A value of the wrong type or out of range: the option, and the value in one of the parser's three ways to show it.
_WRONG_VALUE = re.compile(
    r"--(?P<name>\w[\w.]*): (?P<why>Expected an? |Not of type |Does not validate |Not a valid |Failed to ).*"
    r"(?:(?:Got|Given) value: (?P<value>.*)|: (?P<number>\S*) (?:does not conform|not an?) .*|: (?P<literal>'.*'))$"
)
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_MISSING = "the following arguments are required: "


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One parameter: `flag` is a bool, `many` takes several values, `text` says that their elements are strings."""

    name: str
    hint: Any = str
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


def resolve_hints(function: Any) -> None:
    """Replace the strings in `function`'s signature by the types that they name.

    jsonargparse would do it by executing all imports under TYPE_CHECKING in its module, torch among them.
    """
    if inspect.isclass(function) and not dataclasses.is_dataclass(function):
        function = function.__init__
    hints = get_type_hints(function)
    signature = inspect.signature(function)
    parameters = [each.replace(annotation=hints.get(each.name, each.empty)) for each in signature.parameters.values()]
    function.__annotations__ = hints
    function.__signature__ = signature.replace(
        parameters=parameters, return_annotation=hints.get("return", signature.empty)
    )


def _options_of(name: str, hint: Any, positional: bool) -> Iterator[Option]:
    if dataclasses.is_dataclass(hint):
        for field_name, field_hint in get_type_hints(hint).items():
            yield from _options_of(f"{name}.{field_name}", field_hint, False)
        return
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    lists = [member for member in members if (get_origin(member) or member) in (list, tuple, set, Sequence)]
    elements = {element for member in lists for element in get_args(member)} - {Ellipsis}
    numbers = all(isinstance(element, type) and issubclass(element, (int, float)) for element in elements)
    yield Option(name, hint, positional, bool in members, bool(lists), not numbers)


def normalise(words: Sequence[str], known: dict[str, Option]) -> list[str]:
    """`words` as `--name=value` each, configuration files first, so that flags override them wherever they stand."""
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
    return files + [_format(name, values, known) for name, values in given.items()]


def _check(name: str, known: dict[str, Option]) -> None:
    """Refuse an unknown name; what follows the dot of a known one (a dict's key) is left to the parser."""
    name = name.removesuffix("+")
    if name in COMMON or name in known or name.partition(".")[0] in known:
        return
    # The same word inside a group is likelier than a similar word: --device means --machine.device.
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
    """Give words without a flag to the positional parameters in order; a list takes what the others leave."""
    waiting = [option for option in known.values() if option.positional and option.name not in given]
    for index, option in enumerate(waiting):
        after = len(waiting) - index - 1
        count = max(len(loose) - after, 0) if option.many else 1
        taken, loose = loose[:count], loose[count:]
        if taken:
            yield option.name, taken
    if loose:
        raise ValueError(f"unexpected argument {loose[0]!r}; --help lists the arguments")


def _format(name: str, values: list[str], known: dict[str, Option]) -> str:
    if not values:
        return f"--{name}"
    option = known.get(name, Option(name))
    whole = len(values) == 1 and (values[0].startswith("[") or values[0] == "null")
    if not option.many or whole:
        return f"--{name}={values[-1]}"
    elements = [json.dumps(value, ensure_ascii=False) for value in values] if option.text else values
    return f"--{name}=[{', '.join(elements)}]"


def explain(message: str, normal: Sequence[str], function: Callable[..., object], known: dict[str, Option]) -> str:
    """jsonargparse's error `message` about the words `normal`, in terms of the options that the user typed."""
    message = " ".join(re.sub(r'Parser key "([^"]+)":', r"--\1:", message).split())
    if message.startswith(_MISSING):
        names = message.removeprefix(_MISSING).split(", ")
        missing = [name.upper() if name in known and known[name].positional else f"--{name}" for name in names]
        example = re.search(r"^ *(Example: .*)$", function.__doc__ or "", re.MULTILINE)
        return f"{' and '.join(missing)} must be given" + (f". {example[1]}" if example else "")
    message = re.sub(r"^argument (--\w[\w.]*)\S*: expected one argument$", r"\1 needs a value", message)
    wrong = _WRONG_VALUE.fullmatch(message)
    if wrong and wrong["name"] in known:
        value = next(value for value in (wrong["value"], wrong["number"], wrong["literal"]) if value is not None)
        shown = value if value.startswith("'") else repr(value)
        message = f"--{wrong['name']} takes {_kind(known[wrong['name']].hint)}, not {shown}"
    files = " ".join(word for word in normal if word.startswith("--config="))
    return message.replace("Problems parsing config", f"invalid YAML in {files}")


def _kind(hint: Any) -> str:
    """What a parameter of this type takes, in words."""
    if hint in WORDS or hint in _KINDS:
        return WORDS.get(hint) or _KINDS[hint]
    members = [member for member in get_args(hint) if member not in (type(None), Ellipsis)]
    origin = get_origin(hint)
    if origin is Literal:
        return ("only " if len(members) == 1 else "") + " or ".join(map(str, members))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_kind, members)))
    if origin is dict:
        return "NAME: VALUE pairs, such as '{name: 1}'"
    if origin in (list, tuple, set, Sequence):
        return f"one or more values, each {_kind(members[0])}" if members else "one or more values"
    return getattr(hint, "__name__", str(hint))
