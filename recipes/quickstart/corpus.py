"""The quickstart's text: modules of Python's standard library as bare code, split into documents and questions.

Every machine has it. Comments and docstrings are dropped, and the modules that compress best are taken: in minutes a
small model learns regular code but no English. Three parts share no module: the training corpus (also the
out-of-distribution stores), the prompts for the target's own answers, and the measured questions.
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
# Bytes of a document; lines of code in a question, and between the ends of two questions.
PIECE, SHOWN, APART = 2400, 8, 8
SMALLEST = 3000
LEFT_OUT = {
    "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings", "site-packages", "dist-packages",
}  # fmt: skip


def write_corpus(folder: Path, megabytes: float, asked: int, held_out: int, questions: int, seed: int) -> str:
    """Write the corpus and three files of questions, the measured ones last; returns a summary line."""
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
        f"{size:.1f} MB of code from {len(learned)} modules of the standard library; {len(before)} other modules for "
        f"the target's own answers, and {len(measured)} more for the {len(later[:questions])} measured questions"
    )


def most_regular(limit: float) -> dict[str, str]:
    """Module -> bare code, for the modules that compress best, best first, up to `limit` bytes."""
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
            continue  # some modules are invalid on purpose
    return chosen


def bare_code(text: str) -> str:
    """A module's code without comments and docstrings, formatted by `ast.unparse`."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [one for one in node.body if not _only_text(one)] or [ast.Pass()]
    return ast.unparse(tree)


def _only_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def pieces(text: str) -> Iterator[str]:
    """Split at line ends into pieces of about PIECE bytes."""
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= PIECE:
            yield piece
            piece = ""
    if piece:
        yield piece


def code_questions(name: str, text: str) -> list[dict[str, Any]]:
    """Questions: a few lines of code to continue, without the last line break, which belongs to the next token."""
    lines = text.splitlines()
    starts = range(APART, len(lines) - APART, APART)
    return [{"category": "python", "turns": ["\n".join(lines[at - SHOWN : at]).rstrip()]} for at in starts]


def numbered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"question_id": number, **row} for number, row in enumerate(rows)]
