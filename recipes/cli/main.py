"""The `draftsmith` command: finds the function that a command line names, parses its arguments, reports its errors.

`COMMANDS` is the one list of commands. Options, types and help come from the function's signature and docstring: a
parameter without a default is a positional, a keyword-only one a required option. A module is imported only when its
command or that command's help runs, so `draftsmith --help` is quick.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from draftsmith.recipes.cli.argv import Option


@dataclass(frozen=True, slots=True)
class Command:
    """`function` is "package.module:function"; `summary` its line in `draftsmith --help`, under the heading `part`."""

    function: str
    summary: str
    part: str = ""


# Headings of `draftsmith --help`, in order.
START, BEFORE, LEARNED, STORES, DECODE, MEASURE = (
    "Start here", "Before you train", "Learned drafts", "Retrieved drafts", "Decode", "Measure",
)  # fmt: skip
_IN = "draftsmith.recipes.commands"

COMMANDS: dict[str, Command] = {
    "quickstart": Command(
        "draftsmith.recipes.quickstart.run:quickstart",
        "train drafts, build stores and compare them on this machine",
        START,
    ),
    "recipes": Command(f"{_IN}.recipes:recipes", "list the packaged recipes: scripts and their settings", START),
    "recipes copy": Command(f"{_IN}.recipes:copy", "copy recipes into a folder of yours", START),
    "env": Command(f"{_IN}.checking.env:env", "show installed versions and this machine's hardware", START),
    "data": Command(f"{_IN}.data:data", "show how your data files are read", BEFORE),
    "replay": Command(f"{_IN}.replay:replay", "try drafters on recorded answers, without a target", BEFORE),
    "forecast": Command(
        f"{_IN}.forecast:forecast", "forecast a draft's accepted_length from logs, without decoding", BEFORE
    ),
    "plan": Command(f"{_IN}.plan:plan", "find out which draft would pay, before you train one", BEFORE),
    "answers": Command(f"{_IN}.answers:answers", "write the target's own answers, to train on and to index", LEARNED),
    "train sft": Command(f"{_IN}.train:sft", "train a draft model by supervised fine-tuning", LEARNED),
    "train soft": Command(f"{_IN}.train:soft", "train one draft with several exits (sorted fine-tuning)", LEARNED),
    "train distil": Command(f"{_IN}.train:distil", "train a draft model on the target's distributions", LEARNED),
    "train eagle": Command(f"{_IN}.train:eagle", "train an EAGLE-3 head on a target's states", LEARNED),
    "train medusa": Command(f"{_IN}.train:medusa", "train Medusa heads on a target's states", LEARNED),
    "train hydra": Command(f"{_IN}.train:hydra", "train Hydra heads on a target's states", LEARNED),
    "train draft": Command(f"{_IN}.train:draft", "train a draft model with an objective of your own", LEARNED),
    "train target": Command(f"{_IN}.train:target", "train a small target from scratch on your text", LEARNED),
    "calibrate": Command(
        f"{_IN}.calibrate:calibrate", "measure acceptance by confidence, and the cost of passes", LEARNED
    ),
    "doctor": Command(
        f"{_IN}.checking.doctor:doctor", "check a draft, a head or a target, and how to mend it", LEARNED
    ),
    "export": Command(f"{_IN}.export:export", "write a draft as a plain model, to a folder or the Hub", LEARNED),
    "store build rest": Command(
        f"{_IN}.store.build:build_rest", "build a store of documents for the rest drafter", STORES
    ),
    "store build dresd": Command(
        f"{_IN}.store.build:build_dresd", "build a dense store, keyed by a target's states", STORES
    ),
    "store info": Command(f"{_IN}.store.info:info", "show what a store holds", STORES),
    "store verify": Command(f"{_IN}.store.info:verify", "read a whole store and check every file", STORES),
    "store append": Command(f"{_IN}.store.edit:append", "add documents to a store", STORES),
    "store merge": Command(f"{_IN}.store.edit:merge", "rewrite a store in as few segments as possible", STORES),
    "store remove": Command(f"{_IN}.store.edit:remove", "remove documents from a store, by id or by age", STORES),
    "store quality": Command(
        f"{_IN}.store.quality:quality", "estimate how well a dense store drafts, without decoding", STORES
    ),
    "generate": Command(f"{_IN}.generate:generate", "generate text with a target and a drafter", DECODE),
    "chat": Command(f"{_IN}.serving.chat:chat", "chat in the terminal, with a target or a server", DECODE),
    "serve": Command(f"{_IN}.serving.serve:serve", "serve a target and a drafter to OpenAI's clients", DECODE),
    "bench": Command(f"{_IN}.bench:bench", "measure drafters against plain decoding", MEASURE),
    "compare": Command(f"{_IN}.compare:compare", "compare the speed and the answers of two or more runs", MEASURE),
    "report": Command(
        f"{_IN}.report:report", "write one page from run folders: which drafter to use, and why", MEASURE
    ),
}

# Errors that the user can mend; anything else is a bug and keeps its traceback.
_WRONG_INPUT = (ValueError, FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


def main() -> NoReturn:
    """The console script."""
    if sys.stdout is None:  # closed by the caller (`>&-`): like /dev/null
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.exit(run(sys.argv[1:]))


def run(words: Sequence[str], commands: Mapping[str, Command] = COMMANDS) -> int:
    """Run one command line; its exit code is 0, 2 for wrong input, 130 when interrupted, or the command's own."""
    name, rest = _split(words, commands)
    prefix = f"draftsmith {name}".strip()
    try:
        code = _dispatch(name, rest, commands)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        advice = str(error) or "a command that keeps its progress resumes when it is run again"
        return _fail(f"{prefix}: interrupted; {advice}", 130)
    except BrokenPipeError:
        # The reader has gone (`draftsmith data F | head`): say nothing.
        _discard_stdout()
        return 141
    except _WRONG_INPUT as error:
        return _fail(f"{prefix}: {_one_line(error)}", 2)
    except OSError as error:  # a full disk, a failing file system: no mistake of the user, and no bug
        _discard_stdout()
        reason = _one_line(error) if error.filename else f"the output cannot be written: {error.strerror or error}"
        return _fail(f"{prefix}: {reason}", 1)
    except ModuleNotFoundError as error:
        missing = _missing_extra(error)
        if missing is None:
            raise
        return _fail(f"{prefix}: {missing}", 2)


def _discard_stdout() -> None:
    """Let no later flush of standard output fail."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _split(words: Sequence[str], commands: Mapping[str, Command]) -> tuple[str, list[str]]:
    """The longest command or group of commands that `words` begins with, and the words after it."""
    name, count = "", 0
    for taken in range(1, len(words) + 1):
        candidate = " ".join(words[:taken])
        if candidate in commands or any(_members(candidate, commands)):
            name, count = candidate, taken
    return name, list(words[count:])


def _members(group: str, commands: Mapping[str, Command]) -> Iterable[str]:
    return (name for name in commands if not group or name.startswith(group + " "))


def _dispatch(name: str, rest: list[str], commands: Mapping[str, Command]) -> int:
    if name in commands:
        return _call(name, rest, load(commands[name]))
    if rest and rest[0] in ("-h", "--help"):
        print(_overview(name, commands))
        return 0
    if rest and rest[0] == "--version" and not name:
        print(f"draftsmith {metadata.version('draftsmith')}")
        return 0
    if rest:
        known = [member.removeprefix(name).split()[0] for member in _members(name, commands)]
        close = difflib.get_close_matches(rest[0], [*known, "--help", *([] if name else ["--version"])], n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(dict.fromkeys(known))}"
        raise ValueError(f"unknown {'option' if rest[0].startswith('-') else 'command'} {rest[0]!r}; {hint}")
    print(_overview(name, commands), file=sys.stderr)
    return 2


def load(command: Command) -> Callable[..., Any]:
    """Import the function behind a command."""
    module_name, _, function_name = command.function.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"this installation lacks the module {error.name}") from error
    function: Callable[..., Any] = getattr(module, function_name)
    return function


def _call(name: str, words: list[str], function: Callable[..., Any]) -> int:
    from jsonargparse import ArgumentError

    from draftsmith.recipes.cli.argv import explain, normalise, options, shared

    known = options(function)
    parser = build_parser(name, function, known)
    normal = normalise(words, known)
    if "--help" in normal:  # argparse's own printing hides that the output cannot be written
        print(parser.format_help(), end="")
        return 0
    try:
        parsed = parser.parse_args(normal)
    except ArgumentError as error:
        raise ValueError(explain(str(error), normal, function, known)) from error
    except SystemExit as stop:  # --print_config has printed what was asked for
        return int(stop.code or 0)
    arguments = dict(vars(parser.instantiate(parsed)))
    arguments.pop("config", None)
    built = [
        each(**{key: arguments.pop(key) for key in inspect.signature(each).parameters}) for each in shared(function)
    ]
    if (arguments.get("tp") or 1) > 1:
        return _over_ranks(functools.partial(function, *built, **arguments), arguments)
    code = function(*built, **arguments)
    # Other return values are for callers in Python.
    return int(code) if isinstance(code, int) else 0


def _over_ranks(command: Callable[[], Any], arguments: Mapping[str, Any]) -> int:
    """Run a command whose target is split over ranks, or follow it where torchrun started this process as another."""
    from draftsmith.infer.models.tensor_parallel.launch import end_all

    if int(os.environ.get("RANK", "0")) > 0:
        from draftsmith.infer.models.tensor_parallel.follower import follow_launcher

        return follow_launcher(*(arguments[name] for name in ("target", "dtype", "device", "tp")))
    try:
        code = command()
    finally:
        end_all()
    return int(code) if isinstance(code, int) else 0


def build_parser(name: str, function: Callable[..., Any], known: Mapping[str, Option]) -> ArgumentParser:
    """The parser of one command, made from the function's signature and docstring."""
    from jsonargparse import ArgumentParser

    from draftsmith.recipes.cli.argv import parameters, resolve_hints, shared

    positionals = [
        option.name.upper() + ("..." if option.many else "") for option in known.values() if option.positional
    ]
    usage = " ".join([f"draftsmith {name}", *positionals, "[--config FILE.yaml] [--option value ...]"])
    parser = ArgumentParser(
        prog=f"draftsmith {name}",
        # argparse wraps a description but not a usage, and an example must stay on one line.
        usage="\n\n".join([usage, *_about(function)]).replace("%", "%%"),
        exit_on_error=False,
        default_env=False,
    )
    parser.add_argument("--config", action="config", help="A YAML file with any of these options; flags override it.")
    for source in (*shared(function), function):
        resolve_hints(source)
    for each in shared(function):
        parser.add_class_arguments(each, as_group=False)
    skip: set[str | int] = {name for name in inspect.signature(function).parameters if name not in parameters(function)}
    parser.add_function_arguments(function, as_group=False, skip=skip)
    return parser


def _about(function: Callable[..., Any]) -> list[str]:
    """The paragraphs of a docstring, wrapped; an example stays on one line, to be copied."""
    paragraphs = (inspect.getdoc(function) or "").partition("\nArgs:")[0].strip().split("\n\n")
    width = shutil.get_terminal_size().columns - 2
    return [text if text.startswith("Example: ") else textwrap.fill(text, width) for text in paragraphs]


def _overview(group: str, commands: Mapping[str, Command]) -> str:
    """The commands of a group; without one all commands, under their headings, with one line for each group."""
    parts: dict[str, dict[str, str]] = {}
    for name in _members(group, commands):
        lines = parts.setdefault("" if group else commands[name].part, {})
        first = name.split()[0]
        if group or first in commands:
            lines[name] = commands[name].summary
        else:
            lines[first] = ", ".join(dict.fromkeys(member.split()[1] for member in _members(first, commands)))
    width = max((len(label) for lines in parts.values() for label in lines), default=0)
    blocks = [
        "\n".join([*([part] if part else []), *(f"  {label:<{width}}  {text}" for label, text in lines.items())])
        for part, lines in parts.items()
    ]
    name = f"draftsmith {group}".strip()
    closing = f"`{name} COMMAND --help` shows the options of a command and an example"
    closing += "." if group else ",\nor the commands of a group. `draftsmith --version` shows the version."
    return "\n\n".join([f"usage: {name} COMMAND ...", *blocks, closing])


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _missing_extra(error: ModuleNotFoundError) -> str | None:
    """The message for a missing optional dependency; None if it is not one of ours, and so a bug."""
    from draftsmith.infer.files.provenance import extras

    module = (error.name or "").partition(".")[0]
    package = {"faiss": "faiss-cpu", "fastchat": "fschat"}.get(module, module)
    for extra, packages in extras().items():
        if package in packages:
            return f"{module} is not installed; pip install 'draftsmith[{extra}]' installs it"
    return None


def _fail(line: str, code: int) -> int:
    from draftsmith.recipes.cli.progress import progress

    progress.end()
    if os.environ.get("DRAFTSMITH_TRACEBACK") == "1":
        traceback.print_exc()
    print(line, file=sys.stderr)
    return code
