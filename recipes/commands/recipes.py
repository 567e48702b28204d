"""`draftsmith recipes`: the packaged recipes, listed and copied.

A recipe is a shell script with the YAML files that it reads. Its description is the comment at the top of the script:
a sentence about its purpose, then `Size: small. Measured: not yet.`
"""

from __future__ import annotations

import difflib
import re
import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.resources import files
from json import dumps
from pathlib import Path

_FACTS = re.compile(r"^# Size: (?P<size>[^.]+)\. Measured: (?P<measured>[^.]+)\.$", re.MULTILINE)
_SENTENCE = re.compile(r".+?[.?](?=\s|$)")
_FILE = re.compile(r"\w+\.(?:sh|yaml)\b")


@dataclass(frozen=True, slots=True)
class Recipe:
    """One recipe: purpose, size, whether it was measured, and its files, the script first."""

    name: str
    purpose: str
    size: str
    measured: str
    files: tuple[str, ...]


def recipes(json: bool = False) -> None:
    """List the packaged recipes: the purpose of each, its size, and whether it was measured.

    A recipe is a short shell script with its YAML. `draftsmith recipes copy` copies some to run or to change.

    Example: draftsmith recipes

    Args:
        json: print one JSON object on the last line.
    """
    found = packaged()
    if json:
        print(dumps({"recipes": [asdict(recipe) for recipe in found]}, ensure_ascii=False))
        return
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    for recipe in found:
        print(f"{recipe.name}  ({recipe.size}; measured: {recipe.measured})")
        print(textwrap.fill(recipe.purpose, width, initial_indent="    ", subsequent_indent="    "))
    print("\n`draftsmith recipes copy NAME... --out DIR` copies scripts and the files they read, ready to run.")


def copy(names: list[str], out: str = ".", json: bool = False) -> None:
    """Copy recipes with the files that they read; existing files are never overwritten.

    Example: draftsmith recipes copy train_soft --out my_recipes

    Args:
        names: recipes, as listed by `draftsmith recipes`.
        out: folder to copy to; created if it does not exist.
        json: print one JSON object on the last line.
    """
    known = {recipe.name: recipe for recipe in packaged()}
    chosen = [_find(name.removesuffix(".sh"), known) for name in dict.fromkeys(names)]
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder with --out")
    new = _new_files(chosen, folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in new:
        path = folder / name
        with path.open("x", encoding="utf-8") as file:
            file.write(_text(name))
        if name.endswith(".sh"):
            path.chmod(0o755)
    if json:
        print(dumps({"out": str(folder), "files": new}))
        return
    for name in new:
        print(folder / name)
    print(f"The comment at the top shows how to run it: head -n 20 {folder / chosen[0].files[0]}")


def packaged() -> list[Recipe]:
    """All recipes, by name."""
    names = sorted(entry.name for entry in files("draftsmith.recipes").iterdir() if entry.name.endswith(".sh"))
    return [_read(name) for name in names]


def _read(script: str) -> Recipe:
    header = _text(script).partition("\n")[2]
    facts = _FACTS.search(header)
    assert facts, f"{script} has no line `# Size: ... Measured: ...`"
    comment = " ".join(line.lstrip("# ") for line in header[: facts.start()].splitlines())
    purpose = _SENTENCE.match(comment)
    assert purpose, f"{script} does not begin with its purpose"
    return Recipe(script.removesuffix(".sh"), purpose[0], facts["size"], facts["measured"], tuple(_needs([script])))


def _needs(scripts: Iterable[str]) -> list[str]:
    """`scripts` and the packaged files that they name outside comments, directly or through other scripts."""
    found: dict[str, None] = {}
    waiting = list(scripts)
    while waiting:
        name = waiting.pop(0)
        if name in found:
            continue
        found[name] = None
        if name.endswith(".sh"):
            code = [line for line in _text(name).splitlines() if not line.lstrip().startswith("#")]
            waiting += [other for other in _FILE.findall("\n".join(code)) if _is_packaged(other)]
    return list(found)


def _new_files(chosen: Iterable[Recipe], folder: Path) -> list[str]:
    """The files to write. A file that recipes share may exist already, if it is unchanged."""
    new: list[str] = []
    scripts = {recipe.files[0] for recipe in chosen}
    for name in dict.fromkeys(name for recipe in chosen for name in recipe.files):
        path = folder / name
        if not path.exists():
            new.append(name)
        elif name in scripts or path.read_bytes() != _text(name).encode():
            raise ValueError(f"{path} already exists and would be overwritten; name another folder with --out")
    return new


def _find(name: str, known: dict[str, Recipe]) -> Recipe:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "`draftsmith recipes` lists them"
        raise ValueError(f"there is no recipe {name!r}; {hint}")
    return known[name]


def _is_packaged(name: str) -> bool:
    return files("draftsmith.recipes").joinpath(name).is_file()


def _text(name: str) -> str:
    return files("draftsmith.recipes").joinpath(name).read_text(encoding="utf-8")
