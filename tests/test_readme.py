"""The README: its Python and every command of its code blocks run, in its order, in a folder that holds only what it
says one has.

Models and files are tiny, and further flags (EXTRA) make each command small. What would set up an environment is read
and not run.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from tiny_folders import byte_tokenizer, save, tiny_llama

from draftsmith.infer.drafters.registry import import_class, short_names
from draftsmith.recipes.cli.argv import options
from draftsmith.recipes.cli.main import COMMANDS, load, run

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)

# What a command is given on top of what the README says, so that it takes seconds; a command that is not here is not
# known, and fails.
EXTRA: dict[str, str] = {
    "env": "",
    "recipes": "",
    "data": "",
    "replay": "--limit 20",
    "plan": "--batch_sizes 1 --contexts 16 --lengths 1,2 --trees '' --shapes 1x32,2x32 --seconds 20 --device cpu",
    "answers": "--max_new_tokens 16",
    "train soft": "--max_steps 2 --text.max_length 128 --machine.device cpu --machine.workers 0 --optim.batch_size 2 "
    "--optim.micro_batch_size 1 --watch.val_prompts 0 --watch.val_every 0",
    "calibrate": "--max_new_tokens 12 --seconds 0",
    "bench": "--max_new_tokens 8 --warmup 0",
    "report": "",
    "export": "",
    "store build rest": "",
    "store build dresd": "--dims 8",
    "compare": "",
    "generate": "--max_new_tokens 8",
}


def commands() -> list[list[str]]:
    """The words of every command in the shell blocks, without comments."""
    text = "\n".join(body for kind, body in BLOCKS if kind == "sh").replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def those_of(program: str) -> list[list[str]]:
    return [words for words in commands() if words[0] == program]


def name_of(words: list[str]) -> str:
    """The command that `words`, after `draftsmith`, begin with: the longest, as the command line itself takes it."""
    named = [name for name in COMMANDS if words[: len(name.split())] == name.split()]
    assert named, f"draftsmith {shlex.join(words)}: no such command"
    return max(named, key=len)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a target of twelve layers, and the files that a reader of the README has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))
    told = [f"{n} and {n + 1} are {2 * n + 1}; the fox and the dog count to {n}" for n in range(30)]
    model = tiny_llama(num_hidden_layers=12, hidden_size=32, intermediate_size=32)
    save(tmp_path / "MODEL", model, byte_tokenizer(told))
    asked = [{"prompt": f"what are {n} and {n + 1}?"} for n in range(30)]
    write("logs.jsonl", [row | {"output": answer, "created": 1.76e9 + n}
                         for n, (row, answer) in enumerate(zip(asked, told, strict=True))])  # fmt: skip
    write("prompts.jsonl", asked[:12])
    write("held_out.jsonl", asked[12:16])
    write("questions.jsonl", [{"question_id": n, "category": "sums", "turns": [row["prompt"]]}
                              for n, row in enumerate(asked[16:19])])  # fmt: skip
    return tmp_path


def write(name: str, rows: list[dict]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_command_is_of_a_program_that_is_proven_here():
    assert {kind for kind, _ in BLOCKS} <= {"sh", "text", "python"}
    assert {words[0] for words in commands()} == {"draftsmith", "make", "pip"}


def test_the_python_comes_first_and_both_doors_run_as_printed_and_give_the_models_own_text(
    folders, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name, folder in (("MODEL", folders.target), ("DRAFT", folders.draft)):
        (tmp_path / name).symlink_to(folder)
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))
    assert [kind for kind, _ in BLOCKS][:2] == ["python", "python"]
    ours, theirs = [body for kind, body in BLOCKS if kind == "python"]
    assert len([line for line in (ours + theirs).splitlines() if line]) <= 10
    known = {}
    exec(ours, known)
    exec(theirs, known)
    model, inputs = known["model"], known["inputs"]
    plain = model.generate(**inputs, max_new_tokens=64)
    assert plain.tolist() == known["text"].tolist()
    assert plain.shape[1] > inputs["input_ids"].shape[1] + 8
    prompt = known["tokenizer"].apply_chat_template(
        [{"role": "user", "content": "Why is the sky blue?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    answer = model.generate(prompt, attention_mask=prompt * 0 + 1, max_new_tokens=64)[0, prompt.shape[1] :]
    assert capsys.readouterr().out == known["tokenizer"].decode(answer, skip_special_tokens=True) + "\n"


def test_every_draftsmith_command_runs_in_the_order_of_the_readme(desk, capsys):
    for given in those_of("draftsmith"):
        name = name_of(given[1:])
        assert name in EXTRA, f"{shlex.join(given)}: say in EXTRA how it is made small"
        capsys.readouterr()
        code = run([*given[1:], *shlex.split(EXTRA[name])])
        assert code == 0, f"{shlex.join(given)}\n{capsys.readouterr().err}"
        if "--out" in given:
            assert (desk / given[given.index("--out") + 1]).exists(), shlex.join(given)
    verdict = "\n".join((desk / name).read_text() for name in ("report.md", "report.html"))
    assert "sd2" in verdict


def test_the_make_lines_name_targets_and_hand_the_index_to_pip(tmp_path):
    for words in those_of("make"):
        new = subprocess.run(
            ["make", "-n", *words[1:], f"VENV={tmp_path / 'none'}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert new.returncode == 0, new.stderr
        for index in (word.partition("=")[2] for word in words if word.startswith("TORCH_INDEX=")):
            assert f"--index-url {index} torch==" in new.stdout
        assert "pytest" in new.stdout if "test" in words else "draftsmith quickstart" in new.stdout


def test_the_pip_line_names_extras_and_constraints_that_are_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for words in those_of("pip"):
        assert words[:3] == ["pip", "install", "-c"]
        assert (ROOT / words[3]).is_file()
        (wanted,) = re.fullmatch(r"\.\[(.+)\]", words[4]).groups()
        assert set(wanted.split(",")) <= set(extras)


def test_commands_and_flags_in_the_prose_exist():
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
    told = [shlex.split(code) for code in re.findall(r"`(draftsmith [^`]+)`", prose) if "COMMAND" not in code]
    told += [[*code.split()] for code in re.findall(r"`((?:train|store) [^`]+)`", prose)]
    assert told
    for words in told:
        words = words[1:] if words[0] == "draftsmith" else words
        name = name_of(words)
        known = options(load(COMMANDS[name])) | {"config": None, "help": None}
        flags = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
        assert [flag for flag in flags if flag not in known] == [], name


def test_the_table_of_drafters_has_every_short_name_and_only_settings_that_they_take():
    table = re.search(r"^\| drafter \|.*?\n\n", README, re.DOTALL | re.MULTILINE)[0]
    rows = {}
    for line in table.splitlines()[2:]:
        cell, *others = [cell.strip() for cell in line.strip("| ").split(" | ")]
        for name in re.findall(r"`(\w+)(?::\w+)?`", cell):
            rows[name] = " ".join(others)
    registry = short_names()
    assert set(rows) == set(registry)
    for name, cells in rows.items():
        known = inspect.signature(import_class(name, registry[name]["class_path"])).parameters
        for settings in re.findall(r"`\[([^\]]+)\]`", cells):
            assert {pair.partition("=")[0] for pair in settings.split(",")} <= set(known), (name, settings)
        elsewhere = {"transformers", "vLLM"} & set(registry[name].get("elsewhere", {}))
        assert all(engine in cells for engine in elsewhere), name


def test_links_lead_to_files_and_headings_that_are_there():
    headings = {
        re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.+)$", README, re.M)
    }
    for link in re.findall(r"\]\(([^)]+)\)", README):
        if link.startswith("#"):
            assert link[1:] in headings
        elif "://" not in link:
            assert (ROOT / link.partition("#")[0]).is_file(), link


def test_the_picture_shows_numbers_that_the_readme_or_the_log_has():
    shown = re.findall(r'class="number"[^>]*>([^<]+)<', (ROOT / "docs" / "picture.svg").read_text())
    written = README + (ROOT / "LOG.md").read_text(encoding="utf-8")
    assert len(shown) >= 6
    assert [number for number in shown if not re.search(rf"\b{re.escape(number)}x? \[", written)] == []
