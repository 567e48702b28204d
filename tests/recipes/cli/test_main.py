"""The command line: what reaches a command's function, and how failures are told."""

import json
import subprocess
import sys
import types
from dataclasses import dataclass
from typing import Literal

import pytest

from draftsmith.recipes.cli.argv import normalise, options
from draftsmith.recipes.cli.main import COMMANDS, Command, load, run


@dataclass
class Sampling:
    """How tokens are drawn.

    Args:
        top_k: Tokens kept.
        greedy: Take the best one.
    """

    top_k: int = 0
    greedy: bool = False


def compare(base: str, other: list[str], *, json: bool = False, require: Literal["equal", ""] = "") -> int:
    """Compare runs.

    Args:
        base: The run that others are compared with.
        other: The others.
        json: One JSON object.
        require: What decides about the exit code.
    """
    seen.append({"base": base, "other": other, "json": json})
    return 1 if require == "equal" else 0


def bench(
    *,
    target: str,
    data: list[str] | str = "",
    drafters: str = "",
    max_new_tokens: int = 128,
    exits: list[int] | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008
    json: bool = False,
) -> None:
    """Measure drafters.

    Example: draftsmith bench --target T

    Args:
        target: Folder or name.
    """
    seen.append({**locals()})


def fail(kind: str = "value") -> None:
    """Fail as told."""
    raise {
        "value": ValueError("the file\n  has no rows"),
        "missing": FileNotFoundError(2, "No such file or directory", "rows.jsonl"),
        "refused": PermissionError(13, "Permission denied", "out"),
        "interrupt": KeyboardInterrupt(),
        "extra": ModuleNotFoundError("No module named 'faiss'", name="faiss"),
        "foreign": ModuleNotFoundError("No module named 'nowhere'", name="nowhere"),
        "bug": RuntimeError("a bug"),
    }[kind]


def lines() -> None:
    """Print for ever."""
    while True:
        print("line")


seen: list[dict] = []
TABLE = {
    "compare": Command("fake_commands:compare", "compare runs"),
    "bench": Command("fake_commands:bench", "measure drafters"),
    "fail": Command("fake_commands:fail", "fail as told"),
    "store build rest": Command("fake_commands:bench", "build a REST store"),
    "store info": Command("fake_commands:compare", "look into a store"),
    "absent": Command("draftsmith.recipes.not_written:absent", "not there"),
}


@pytest.fixture(autouse=True)
def commands(monkeypatch):
    module = types.ModuleType("fake_commands")
    module.compare, module.bench, module.fail = compare, bench, fail
    monkeypatch.setitem(sys.modules, "fake_commands", module)
    monkeypatch.delenv("DRAFTSMITH_TRACEBACK", raising=False)
    seen.clear()


def call(*words):
    return run(words, TABLE)


def error_of(capsys):
    """The one line on stderr; nothing on stdout."""
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    return line


def test_positionals_take_words_in_order_and_the_list_takes_the_rest():
    assert call("compare", "a", "--json", "b", "c d") == 0
    assert seen == [{"base": "a", "other": ["b", "c d"], "json": True}]


def test_positionals_may_be_given_by_flag_and_by_file(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("base: a\nother: [b, c]\n")
    assert call("compare", "--config", str(config)) == 0
    assert call("compare", "--base", "a", "b", "c") == 0
    assert call("compare", "--other", "b", "c", "--base=a") == 0
    assert seen == [{"base": "a", "other": ["b", "c"], "json": False}] * 3


def test_hyphens_and_underscores_are_alike_in_flags_and_untouched_in_values():
    call("bench", "--target", "my-model_v-1", "--max-new-tokens", "7", "--sampling.top-k=3")
    assert (seen[0]["target"], seen[0]["max_new_tokens"], seen[0]["sampling"].top_k) == ("my-model_v-1", 7, 3)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], False),
        (["--json"], True),
        (["--json", "true"], True),
        (["--json", "false"], False),
        (["--json=true"], True),
    ],
)
def test_a_boolean_is_a_bare_flag_or_takes_true_or_false(words, expected):
    assert call("bench", "--target=t", *words) == 0
    assert seen[0]["json"] is expected


def test_a_bare_boolean_does_not_eat_the_word_after_it():
    call("compare", "--json", "a", "b")
    assert seen == [{"base": "a", "other": ["b"], "json": True}]


def test_a_boolean_inside_a_dataclass_is_a_bare_flag_too():
    call("bench", "--target=t", "--sampling.greedy", "--sampling.top_k", "2")
    assert seen[0]["sampling"] == Sampling(top_k=2, greedy=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--exits", "6", "9"], [6, 9]),
        (["--exits", "[6,9,12]"], [6, 9, 12]),
        (["--exits=6", "--exits=9"], [6, 9]),
        (["--exits", "null"], None),
    ],
)
def test_a_list_takes_several_words_or_one_in_brackets(words, expected):
    call("bench", "--target=t", *words)
    assert seen[0]["exits"] == expected


def test_text_stays_text_whatever_it_looks_like():
    call("bench", "--target", "123", "--drafters", "pld,small:a[b=1],more.yaml", "--data", "f: 1.jsonl", "x,y")
    assert seen[0]["target"] == "123"
    assert seen[0]["drafters"] == "pld,small:a[b=1],more.yaml"
    assert seen[0]["data"] == ["f: 1.jsonl", "x,y"]


def test_flags_override_the_configuration_wherever_it_stands(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("target: from-file\nmax_new_tokens: 5\nsampling: {top_k: 9}\n")
    call("bench", "--max_new_tokens", "6", "--config", str(config), "--sampling.greedy")
    assert (seen[0]["target"], seen[0]["max_new_tokens"]) == ("from-file", 6)
    assert seen[0]["sampling"] == Sampling(top_k=9, greedy=True)


def test_an_unknown_key_in_the_configuration_is_an_error(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text("target: t\nmax_tokens: 5\n")
    assert call("bench", "--config", str(config)) == 2
    assert "max_tokens" in error_of(capsys)


def test_a_configuration_that_is_not_yaml_is_named(tmp_path, capsys):
    config = tmp_path / "broken.yaml"
    config.write_text("target: [t\n")
    assert call("bench", "--config", str(config)) == 2
    assert f"invalid YAML in --config={config}: " in error_of(capsys)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--target=t", "--max-new-tokns", "3"], "unknown option --max_new_tokns; did you mean --max_new_tokens?"),
        (["--target=t", "--max", "3"], "unknown option --max"),
        (["--target=t", "--sampling.topk=3"], "unknown option --sampling.topk; did you mean --sampling.top_k?"),
        (["--target=t", "--sampling.greedy=perhaps"], "--sampling.greedy takes true or false, not 'perhaps'"),
        (["--target=t", "--max_new_tokens", "many"], "--max_new_tokens takes a whole number, not 'many'"),
        (["--target=t", "stray"], "unexpected argument 'stray'"),
        (["--target"], "--target needs a value"),
        ([], "--target must be given. Example: draftsmith bench --target T"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_arguments_end_in_one_line_and_exit_code_2(words, told, capsys):
    assert call("bench", *words) == 2
    line = error_of(capsys)
    assert line.startswith("draftsmith bench: ")
    assert told in line
    assert seen == []


@pytest.mark.parametrize(
    ("kind", "code", "told"),
    [
        ("value", 2, "draftsmith fail: the file has no rows"),
        ("missing", 2, "draftsmith fail: rows.jsonl: No such file or directory"),
        ("refused", 2, "draftsmith fail: out: Permission denied"),
        ("interrupt", 130, "draftsmith fail: interrupted; "),
        ("extra", 2, "draftsmith fail: faiss is not installed; pip install 'draftsmith[retrieval]' installs it"),
    ],
)
def test_what_a_person_can_mend_is_told_in_one_line(kind, code, told, capsys):
    assert call("fail", "--kind", kind) == code
    assert error_of(capsys).startswith(told)


@pytest.mark.parametrize(("kind", "error"), [("bug", RuntimeError), ("foreign", ModuleNotFoundError)])
def test_a_bug_keeps_its_traceback(kind, error):
    with pytest.raises(error):
        call("fail", "--kind", kind)


def test_a_traceback_can_be_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("DRAFTSMITH_TRACEBACK", "1")
    assert call("fail") == 2
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert told.splitlines()[-1] == "draftsmith fail: the file has no rows"


def test_the_functions_number_is_the_exit_code():
    assert call("compare", "a", "b", "--require", "equal") == 1


def test_nested_commands_are_named_word_by_word(capsys):
    assert call("store", "build", "rest", "--target", "t") == 0
    assert seen[0]["target"] == "t"
    assert call("store", "--help") == 0
    told = capsys.readouterr().out
    assert "store build rest" in told
    assert "bench " not in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["bnech"], "draftsmith: unknown command 'bnech'; did you mean 'bench'?"),
        (["store", "biuld"], "draftsmith store: unknown command 'biuld'; did you mean 'build'?"),
        (["--verison"], "draftsmith: unknown option '--verison'; did you mean '--version'?"),
        (["zzz"], "draftsmith: unknown command 'zzz'; known are compare, bench, fail, store, absent"),
        (["absent"], "draftsmith absent: this installation lacks the module draftsmith.recipes.not_written"),
    ],
)
def test_an_unknown_or_absent_command_is_told_in_one_line(words, told, capsys):
    assert call(*words) == 2
    assert error_of(capsys) == told


def test_help_lists_every_command_and_none_at_all_is_an_error(capsys):
    assert call("--help") == 0
    told = capsys.readouterr().out
    group = {name: command for name, command in TABLE.items() if name.startswith("store ")}
    assert all(name in told and command.summary in told for name, command in TABLE.items() if name not in group)
    assert "  store    build, info\n" in told
    assert call() == 2
    assert capsys.readouterr().err == told
    assert call("store", "--help") == 0
    told = capsys.readouterr().out
    assert all(name in told and command.summary in told for name, command in group.items())


def test_the_help_of_a_command_shows_usage_options_and_descriptions(capsys):
    assert call("compare", "--help") == 0
    told = capsys.readouterr().out
    assert told.startswith("usage: draftsmith compare BASE OTHER...")
    assert "Compare runs." in told
    assert "The run that others are compared with." in told
    assert "Args:" not in told


def test_every_command_that_is_there_has_a_summary_a_docstring_and_a_parser(capsys):
    for name, command in COMMANDS.items():
        assert command.summary
        try:
            function = load(command)
        except ValueError:
            continue
        assert function.__doc__, name
        assert run([*name.split(), "--help"]) == 0
    assert "env" in COMMANDS


def test_a_word_after_two_hyphens_is_never_an_option():
    assert normalise(["--", "--json", "b"], options(compare)) == ["--base=--json", '--other=["b"]']


@pytest.mark.parametrize("words", [["--help"], ["--version"], []])
def test_help_and_version_import_nothing_heavy(words):
    probe = (
        "import json, sys\nfrom draftsmith.recipes.cli.main import run\nrun(json.loads(sys.argv[1]))\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'jsonargparse', 'yaml'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, json.dumps(words)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_leaves_ends_the_command_in_silence():
    program = (
        f"import sys; sys.path.insert(0, {str(__file__.rpartition('/')[0])!r})\n"
        "from draftsmith.recipes.cli.main import Command, run\n"
        "sys.exit(run(['lines'], {'lines': Command('test_main:lines', 'print for ever')}))"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_the_console_script_hands_its_exit_code_to_the_shell():
    program = "import sys; sys.argv[1:] = ['zzz']; from draftsmith.recipes.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
