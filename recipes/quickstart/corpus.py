"""The quickstart's text: modules of Python's standard library as bare code, and what is asked of others.

Every machine that runs this has it. Comments and docstrings are left out, and of all modules those that compress best
are taken: in minutes a small model learns regular code, and English not at all. Three parts share no module: what is
learned (and makes the stores of other text), what the target is asked beforehand, and what is measured. What becomes
of the text is not known here.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CORPUS, ASKED, HELD_OUT, QUESTIONS = "corpus.jsonl", "asked_before.jsonl", "held_out.jsonl", "questions.jsonl"
# Bytes of a document of the corpus; lines of code that a question shows, and between two questions.
PIECE, SHOWN, APART = 2400, 8, 8
SMALLEST = 3000
LEFT_OUT = {
    "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings", "site-packages", "dist-packages",
}  # fmt: skip


def write_corpus(folder: Path, megabytes: float, asked: int, held_out: int, questions: int, seed: int) -> str:
    """The corpus and three files of questions, the one to be measured last; returns a line that says what there is."""
    from draftsmith.infer.files.atomic import write_rows

    modules = most_regular(megabytes * 1e6)
    names = list(modules)
    measured, before = names[4::8], names[::8]
    learned = [name for name in names if name not in {*measured, *before}]
    rng = random.Random(seed)
    documents = [{"text": piece} for name in learned for piece in pieces(modules[name])]
    earlier = [row for name in before for row in code_questions(name, modules[name])]
    later = [row for name in measured for row in code_questions(name, modules[name])]
    for rows in (documents, earlier, later):
        rng.shuffle(rows)
    write_rows(folder / CORPUS, documents)
    write_rows(folder / ASKED, numbered(earlier[held_out : held_out + asked]))
    write_rows(folder / HELD_OUT, numbered(earlier[:held_out]))
    write_rows(folder / QUESTIONS, numbered(later[:questions]))
    size = sum(len(row["text"]) for row in documents) / 1e6
    return (
        f"{size:.1f} MB of code from {len(learned)} modules of the standard library; {len(before)} other modules to "
        f"ask the target about beforehand, and {len(measured)} more for the {len(later[:questions])} measured questions"
    )


def most_regular(limit: float) -> dict[str, str]:
    """Module -> its bare code: those that compress best, until there are `limit` bytes; best first."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sizes: dict[str, float] = {}
    for path in root.rglob("*.py"):
        own = path.relative_to(root)
        if not LEFT_OUT & set(own.parts) and path.stat().st_size >= SMALLEST:
            text = path.read_bytes()
            sizes[own.as_posix()] = len(zlib.compress(text)) / len(text)
    chosen: dict[str, str] = {}
    for name in sorted(sizes, key=lambda name: (sizes[name], name)):
        if sum(map(len, chosen.values())) >= limit:
            break
        try:
            chosen[name] = bare_code((root / name).read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # some are there to be wrong
    return chosen


def bare_code(text: str) -> str:
    """A module's code without comments and docstrings, written in one way."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [one for one in node.body if not _only_text(one)] or [ast.Pass()]
    return ast.unparse(tree)


def _only_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def pieces(text: str) -> Iterator[str]:
    """Whole lines, about PIECE bytes at a time."""
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= PIECE:
            yield piece
            piece = ""
    if piece:
        yield piece


def code_questions(name: str, text: str) -> list[dict[str, Any]]:
    """A few lines each, to be continued. They end before the line break, which belongs to the token that follows."""
    lines = text.splitlines()
    starts = range(APART, len(lines) - APART, APART)
    return [{"category": "python", "turns": ["\n".join(lines[at - SHOWN : at]).rstrip()]} for at in starts]


def numbered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"question_id": number, **row} for number, row in enumerate(rows)]
