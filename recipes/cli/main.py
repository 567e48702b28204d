"""The `draftsmith` command: which function a command line names, its arguments, and how its failures are told.

`COMMANDS` is the one place that lists commands. Options, types and help come from a function's signature and docstring
(a parameter without a default is a positional; a keyword-only one is a required option). A command's module is imported
only when that command or its help runs, so `draftsmith --help` costs nothing. Knows nothing of what commands do.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
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


# Headings of `draftsmith --help`, in the order of its parts.
START, KNOW, LEARN, STORES, DECODE, MEASURE, CHECK = (
    "Begin here",
    "Know before you spend",
    "Learned drafts",
    "Retrieved drafts",
    "Decode",
    "Measure",
    "Check our own claims",
)

COMMANDS: dict[str, Command] = {
    "quickstart": Command(
        "draftsmith.recipes.quickstart.command:quickstart", "train, retrieve and compare on this machine", START
    ),
    "recipes": Command(
        "draftsmith.recipes.commands.recipes:recipes", "the packaged recipes: scripts and settings", START
    ),
    "recipes copy": Command("draftsmith.recipes.commands.recipes:copy", "copy recipes to a folder of yours", START),
    "env": Command("draftsmith.recipes.commands.env:env", "what is installed and what this machine is", START),
    "data": Command("draftsmith.recipes.commands.data:data", "what the reader makes of your files", KNOW),
    "replay": Command(
        "draftsmith.recipes.commands.replay:replay", "drafters against recorded answers, without a target", KNOW
    ),
    "plan": Command(
        "draftsmith.recipes.commands.plan:plan", "which draft would pay here, before anything is trained", KNOW
    ),
    "answers": Command(
        "draftsmith.recipes.commands.answers:answers",
        "the target's own answers: what drafts learn and stores hold",
        LEARN,
    ),
    "train sft": Command(
        "draftsmith.recipes.commands.train:sft", "train a draft model by supervised fine-tuning", LEARN
    ),
    "train soft": Command(
        "draftsmith.recipes.commands.train:soft", "train one draft with several exits (sorted fine-tuning)", LEARN
    ),
    "train distil": Command(
        "draftsmith.recipes.commands.train:distil", "train a draft model on the target's own distribution", LEARN
    ),
    "train draft": Command(
        "draftsmith.recipes.commands.train:draft", "train a draft model with an objective of your own", LEARN
    ),
    "train target": Command(
        "draftsmith.recipes.commands.train:target", "train a small target from scratch on your text", LEARN
    ),
    "calibrate": Command(
        "draftsmith.recipes.commands.calibrate:calibrate", "what confidence and passes are worth, per target", LEARN
    ),
    "export": Command(
        "draftsmith.recipes.commands.export:export", "a trained draft as a plain model, to a folder or the Hub", LEARN
    ),
    "store build rest": Command(
        "draftsmith.recipes.commands.store.rest:build_rest", "a store of documents for the rest drafter", STORES
    ),
    "store build dresd": Command(
        "draftsmith.recipes.commands.store.dresd:build_dresd", "a dense store of what a target says", STORES
    ),
    "store info": Command("draftsmith.recipes.commands.store.rest:info", "what a store holds", STORES),
    "store verify": Command(
        "draftsmith.recipes.commands.store.rest:verify", "read a store through and check every file", STORES
    ),
    "store append": Command("draftsmith.recipes.commands.store.edit:append", "add documents to a store", STORES),
    "store merge": Command(
        "draftsmith.recipes.commands.store.edit:merge", "rewrite a store in as few segments as will do", STORES
    ),
    "store remove": Command(
        "draftsmith.recipes.commands.store.edit:remove", "take documents out of a store, by id or by age", STORES
    ),
    "store quality": Command(
        "draftsmith.recipes.commands.store.quality:quality", "what a dense store is worth, without decoding", STORES
    ),
    "generate": Command("draftsmith.recipes.commands.generate:generate", "text from a target and a drafter", DECODE),
    "bench": Command(
        "draftsmith.recipes.commands.bench:bench", "one target, many drafters, against plain decoding", MEASURE
    ),
    "compare": Command(
        "draftsmith.recipes.commands.compare:compare", "speed and equality of two or more runs", MEASURE
    ),
    "report": Command(
        "draftsmith.recipes.commands.report:report", "one page from run folders: which drafter to use, and why", MEASURE
    ),
    "plan bench": Command(
        "draftsmith.recipes.studies.bench_plan:bench_plan", "what plan predicts beside what the loop does", CHECK
    ),
    "store bench rest": Command(
        "draftsmith.recipes.studies.bench_rest:bench_rest", "rest beside REST's own rule, replayed", CHECK
    ),
    "store bench dresd": Command(
        "draftsmith.recipes.studies.bench_dresd:bench_dresd", "retrieval drafters against plain decoding", CHECK
    ),
    "store scale": Command(
        "draftsmith.recipes.studies.scale_rest:scale_rest", "time and memory of a large rest store", CHECK
    ),
}

# What the person gave and the machine refused, as against a bug of ours.
_WRONG_INPUT = (ValueError, FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


def main() -> NoReturn:
    """The console script."""
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
        told = str(error) or "a command that keeps its progress goes on when it is run again"
        return _tell(f"{prefix}: interrupted; {told}", 130)
    except BrokenPipeError:
        # The reader has left (`draftsmith data F | head`): nobody is there to be told, and no flush may fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except _WRONG_INPUT as error:
        return _tell(f"{prefix}: {_one_line(error)}", 2)
    except ModuleNotFoundError as error:
        missing = _missing_extra(error)
        if missing is None:
            raise
        return _tell(f"{prefix}: {missing}", 2)


def _split(words: Sequence[str], commands: Mapping[str, Command]) -> tuple[str, list[str]]:
    """The longest command, or group of commands, that `words` begins with, and the words after it."""
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

    from draftsmith.recipes.cli.argv import normalise, options, shared
    from draftsmith.recipes.cli.parse_errors import in_words
    from draftsmith.recipes.cli.renamed import RENAMED, refuse_old_keys

    known, renamed = options(function), RENAMED.get(name, {})
    parser = build_parser(name, function, known)
    normal = normalise(words, known, renamed)
    try:
        parsed = parser.parse_args(normal)
    except ArgumentError as error:
        refuse_old_keys(str(error), renamed)
        raise ValueError(in_words(str(error), normal, function, known)) from error
    except SystemExit as stop:  # --help and --print_config have printed what was asked for
        return int(stop.code or 0)
    arguments = dict(vars(parser.instantiate(parsed)))
    arguments.pop("config", None)
    built = [
        each(**{key: arguments.pop(key) for key in inspect.signature(each).parameters}) for each in shared(function)
    ]
    code = function(*built, **arguments)
    # Any other result is for callers in Python.
    return int(code) if isinstance(code, int) else 0


def build_parser(name: str, function: Callable[..., Any], known: Mapping[str, Option]) -> ArgumentParser:
    """The parser of one command, made from the function's signature and docstring."""
    from jsonargparse import ArgumentParser

    from draftsmith.recipes.cli.argv import parameters, shared

    positionals = [
        option.name.upper() + ("..." if option.many else "") for option in known.values() if option.positional
    ]
    usage = " ".join([f"draftsmith {name}", *positionals, "[--config FILE.yaml] [--option value ...]"])
    parser = ArgumentParser(
        prog=f"draftsmith {name}",
        # argparse prints a usage as it stands, and would break an example in a description into lines.
        usage="\n\n".join([usage, *_about(function)]).replace("%", "%%"),
        exit_on_error=False,
        default_env=False,
    )
    parser.add_argument("--config", action="config", help="A YAML file with any of these options; flags override it.")
    for each in shared(function):
        parser.add_class_arguments(each, as_group=False)
    skip: set[str | int] = {name for name in inspect.signature(function).parameters if name not in parameters(function)}
    parser.add_function_arguments(function, as_group=False, skip=skip)
    return parser


def _about(function: Callable[..., Any]) -> list[str]:
    """The paragraphs of a docstring; an example stays one line, to be copied."""
    paragraphs = (inspect.getdoc(function) or "").partition("\nArgs:")[0].strip().split("\n\n")
    width = shutil.get_terminal_size().columns - 2
    return [text if text.startswith("Example: ") else textwrap.fill(text, width) for text in paragraphs]


def _overview(group: str, commands: Mapping[str, Command]) -> str:
    """The commands of a group, or all, under their headings."""
    names = list(_members(group, commands))
    width = max(map(len, names), default=0)
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault("" if group else commands[name].part, []).append(
            f"  {name:<{width}}  {commands[name].summary}"
        )
    blocks = ["\n".join([part, *lines] if part else lines) for part, lines in parts.items()]
    usage = f"usage: draftsmith {group} COMMAND ...".replace("  ", " ")
    closing = "`draftsmith COMMAND --help` tells its options, with an example; `draftsmith --version` the version."
    return "\n\n".join([usage, *blocks, closing])


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _missing_extra(error: ModuleNotFoundError) -> str | None:
    """The line for an optional dependency that is absent; None where it is not one of ours, and so a bug."""
    from draftsmith.infer.files.provenance import extras

    module = (error.name or "").partition(".")[0]
    package = {"faiss": "faiss-cpu", "fastchat": "fschat"}.get(module, module)
    for extra, packages in extras().items():
        if package in packages:
            return f"{module} is not installed; pip install 'draftsmith[{extra}]' brings it"
    return None


def _tell(line: str, code: int) -> int:
    from draftsmith.recipes.cli.progress import progress

    progress.end()
    if os.environ.get("DRAFTSMITH_TRACEBACK") == "1":
        traceback.print_exc()
    print(line, file=sys.stderr)
    return code
