"""Options that commands share, told once: a command takes those of another and adds its own.

Command lines, help and YAML all come from a function's signature, hints and docstring; so sharing options means to give
the function those of both. Knows no command.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

Function = TypeVar("Function", bound=Callable[..., Any])

_ARGS = "\n    Args:\n"
_TOLD = re.compile(r"^ {8}(\w+): ", re.MULTILINE)


def with_options_of(other: Callable[..., Any]) -> Callable[[Function], Function]:
    """A decorator: the function's `**options` become the parameters of `other` that it does not name itself."""

    def add(function: Function) -> Function:
        own = dict(inspect.signature(function).parameters)
        taken = [name for name, parameter in own.items() if parameter.kind is parameter.VAR_KEYWORD]
        assert taken, f"{function.__name__} has no **options to take them"
        del own[taken[0]]
        theirs = inspect.signature(other).parameters
        parameters = [own.get(name, parameter) for name, parameter in theirs.items()]
        parameters += [parameter for name, parameter in own.items() if name not in theirs]
        hints = get_type_hints(other) | get_type_hints(function)
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        function.__annotations__ = {name: hint for name, hint in hints.items() if name != taken[0]}
        function.__doc__ = _joined(function.__doc__ or "", other.__doc__ or "", [each.name for each in parameters])
        return function

    return add


def _joined(own: str, other: str, names: list[str]) -> str:
    """The first docstring, with an entry for each of `names`: its own, or the other's."""
    about = own.partition(_ARGS)[0].rstrip()
    told = _entries(other) | _entries(own)
    return about + "\n" + _ARGS + "".join(told[name] for name in names if name in told) + "    "


def _entries(docstring: str) -> dict[str, str]:
    """The lines of each parameter, as they stand."""
    lines = docstring.partition(_ARGS)[2].rstrip() + "\n"
    starts = list(_TOLD.finditer(lines))
    ends = [match.start() for match in starts[1:]] + [len(lines)]
    return {match[1]: lines[match.start() : end] for match, end in zip(starts, ends)}
