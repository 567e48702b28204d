"""The quickstart's text: bare code, three parts that share no module, and the same every time."""

from __future__ import annotations

import ast
import json

import pytest

from draftsmith.recipes.quickstart.corpus import ASKED, CORPUS, HELD_OUT, QUESTIONS, bare_code, pieces, write_corpus

MODULE = '''"""What it is."""
# why
class One:
    """A docstring."""

    def only_text(self):
        "nothing else"

    async def two(self, x='a'):  # a comment
        """Another."""
        return x, """kept"""
'''


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    line = write_corpus(folder, 0.4, 20, 5, 4, seed=0)
    return folder, line


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_comments_and_docstrings_are_left_out_and_strings_are_not():
    bare = bare_code(MODULE)
    assert "What it is" not in bare
    assert "docstring" not in bare
    assert "Another" not in bare
    assert "#" not in bare
    assert "kept" in bare
    assert ast.unparse(ast.parse(bare)) == bare


def test_pieces_are_whole_lines_and_lose_nothing():
    text = "".join(f"line {number}\n" for number in range(1000))
    cut = list(pieces(text))
    assert "".join(cut) == text
    assert all(piece.endswith("\n") for piece in cut)


def test_what_is_asked_stands_in_no_text_that_is_learned(written):
    folder, line = written
    learned = "".join(row["text"] for row in rows(folder / CORPUS))
    asked = {name: [row["turns"][0] for row in rows(folder / name)] for name in (ASKED, HELD_OUT, QUESTIONS)}
    assert [len(found) for found in asked.values()] == [20, 5, 4]
    assert "4 measured questions" in line
    flat = [question for found in asked.values() for question in found]
    assert len(set(flat)) == len(flat)
    assert not any(question in learned for question in flat)
    assert not any(question.endswith("\n") for question in flat)


def test_the_same_seed_gives_the_same_files(written, tmp_path):
    write_corpus(tmp_path, 0.4, 20, 5, 4, seed=0)
    for name in (CORPUS, ASKED, HELD_OUT, QUESTIONS):
        assert (tmp_path / name).read_bytes() == (written[0] / name).read_bytes()
