"""What docs/ says is true: its Python runs, its commands parse, its links lead somewhere, its figures have a source."""

from __future__ import annotations

import re
import shlex
import sys
import types
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.table import Table
from tiny_folders import Folders
from tiny_models import tiny_model

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def run_python(page: Path) -> dict[str, Any]:
    """The page's Python, top to bottom, in one module."""
    module = types.ModuleType("page_under_test")
    for number, code in enumerate(blocks(page, "python"), start=1):
        exec(compile(code, f"{page.name}, block {number}", "exec"), module.__dict__)
    return vars(module)


def test_there_are_the_seven_pages_and_the_figure() -> None:
    # The picture is the README's, and tested with it.
    names = {path.name for path in DOCS.iterdir()} - {"picture.svg"}
    assert names == {
        "how-it-works.md", "choosing-a-drafter.md", "adding-a-drafter.md", "heads.md", "python.md", "numbers.md",
        "scale.md", "serving.md", "step.svg",
    }  # fmt: skip


@pages
def test_every_block_says_what_it_is_and_is_checked_here(page: Path) -> None:
    kinds = {kind for kind, _ in FENCE.findall(page.read_text())}
    assert kinds <= {"python", "sh", "yaml"}
    assert page.read_text().count("```") == 2 * len(FENCE.findall(page.read_text()))


@pages
def test_the_python_of_a_page_runs(
    page: Path, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, folder in (("MODEL", folders.target), ("DRAFT", folders.draft)):
        (tmp_path / name).symlink_to(folder)
    with torch.random.fork_rng(devices=[]):
        run_python(page)


def commands(page: Path) -> Iterator[str]:
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                yield line.partition("  #")[0].strip()
    yield from re.findall(r"`(draftsmith [^`]+)`", prose(page))


def check(line: str, whole: bool) -> None:
    """A command of a block is parsed whole; one named in a sentence has the options that it names."""
    from draftsmith.recipes.cli.argv import normalise, options
    from draftsmith.recipes.cli.main import COMMANDS, _split, build_parser, load

    words = shlex.split(line)
    assert words[0] == "draftsmith", line
    name, rest = _split(words[1:], COMMANDS)
    assert name, line
    if name not in COMMANDS:
        assert not rest, line
        return
    function = load(COMMANDS[name])
    known = options(function)
    normal = normalise(rest, known)
    if whole:
        parser = build_parser(name, function, known)
        parser.instantiate(parser.parse_args(normal))


@pages
def test_every_command_of_a_page_is_one_that_its_parser_takes(page: Path) -> None:
    inside = [line for line in commands(page) if line in " ".join(blocks(page, "sh"))]
    for line in commands(page):
        check(line, whole=line in inside)


def test_a_command_that_is_wrong_would_be_found() -> None:
    for wrong in ("draftsmith bench --target T --data d --dratfers pld", "draftsmith benhc"):
        with pytest.raises((ValueError, AssertionError)):
            check(wrong, whole=False)


@pages
def test_the_yaml_of_a_page_names_drafters_as_the_loader_reads_them(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from draftsmith.recipes.cli.inputs import parse_drafters

    for number, text in enumerate(blocks(page, "yaml")):
        (name, entry), *_ = yaml.safe_load(text).items()
        package, _, class_name = entry["class_path"].rpartition(".")
        folder = tmp_path.joinpath(*package.split(".")[:-1])
        folder.mkdir(parents=True)
        (folder / f"{package.split('.')[-1]}.py").write_text(blocks(page, "python")[number])
        (tmp_path / f"{name}.yaml").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        drafters = parse_drafters(str(tmp_path / f"{name}.yaml"))
        assert [type(one).__name__ for one in drafters.values()] == [class_name]
        for module in [one for one in sys.modules if one.partition(".")[0] == package.partition(".")[0]]:
            monkeypatch.delitem(sys.modules, module)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.is_file(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(found), f"{page.name}: {link}"


def test_every_page_leads_to_the_others() -> None:
    linked = {path.name: set(LINK.findall(path.read_text())) for path in PAGES}
    reached = {"how-it-works.md"}
    for _ in PAGES:
        reached |= {link.partition("#")[0] for name in reached & linked.keys() for link in linked[name]}
    assert {path.name for path in PAGES} <= reached


@pages
def test_files_that_a_page_names_are_there(page: Path) -> None:
    for name in re.findall(r"`((?:infer|retrieval|train|recipes|tests|docs)/[\w/.-]+)`", prose(page)):
        assert (ROOT / name.rstrip("/")).exists(), name


@pages
def test_a_page_is_short_and_plain(page: Path) -> None:
    text = page.read_text()
    assert len(text.splitlines()) < 200
    assert all(len(line) <= 250 for line in text.splitlines())
    assert not re.search(r"(?<![\w/.:)])/\w+/\w", text), "a path of somebody's machine"


def test_the_drafter_of_the_page_is_short_and_keeps_the_protocol() -> None:
    from draftsmith.infer.contract.protocols import Drafter

    code = blocks(DOCS / "adding-a-drafter.md", "python")[0]
    assert len(code.splitlines()) < 40
    made: dict[str, Any] = {}
    exec(code, made)
    assert isinstance(made["Habit"](), Drafter)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_drafter_of_the_page_is_lossless_on_other_models_too(architecture: str, temperature: float) -> None:
    from draftsmith.infer.contract.row import Row, Stops
    from draftsmith.infer.contract.sampling import Settings
    from draftsmith.infer.drafters.controls import Empty
    from draftsmith.infer.engine.generate import generate
    from draftsmith.infer.models.hf_target import HFTarget

    made: dict[str, Any] = {}
    exec(blocks(DOCS / "adding-a-drafter.md", "python")[0], made)
    target = HFTarget(tiny_model(architecture))

    def decode(drafter: Any, batch_size: int) -> list[Any]:
        drafter.bind(target)
        settings = Settings(temperature=temperature, seed=5)
        rows = [Row(str(i), [*range(4, 10 + 2 * i)] * 3, settings, Stops(48 - 5 * i)) for i in range(6)]
        return generate(target, drafter, rows, batch_size=batch_size)

    plain, habit = decode(Empty(), 1), made["Habit"](depth=3)
    drafted = decode(habit, 3)
    assert [one.token_ids for one in drafted] == [one.token_ids for one in plain]
    traces = [trace for one in drafted for trace in one.traces]
    assert sum(trace.accepted for trace in traces) > 0
    assert any(not tried.accepted for trace in traces for tried in trace.tried)
    assert habit.after == {}, "rows that left are forgotten"


def test_the_check_of_the_page_finds_a_drafter_that_changes_the_text() -> None:
    class Meddling:
        """Writes a token of its own into the text, now and then."""

        def observe(self, rows: Any, verdicts: Any, feedback: Any) -> None:
            for row in rows:
                if len(row.ids) % 7 == 0:
                    row.ids[-1] = (row.ids[-1] + 1) % 40

    made: dict[str, Any] = {}
    code, test = blocks(DOCS / "adding-a-drafter.md", "python")
    exec(code, made)
    habit = made["Habit"]
    made["Habit"] = lambda: type("Planted", (habit,), {"observe": Meddling.observe, "_": None})()
    with torch.random.fork_rng(devices=[]), pytest.raises((AssertionError, RuntimeError, ValueError)):
        exec(test, made)


def printed_columns() -> set[str]:
    """The heads of every table that a command prints, and of the report's."""
    from draftsmith.infer.measure import tables
    from draftsmith.infer.measure.report.report import HEAD

    empty: dict[str, Any] = {"others": {}}
    made = [tables.speed_table({}), tables.time_table({}), tables.equality_table(empty)]
    made += [tables.task_table(SPEC | {"speedup_of": basis}) for basis in ("same_run", "own_plain")]
    made.append(tables.spec_bench_table(SPEC))
    replayed: dict[str, Any] = {"drafters": {}, "streams": 0, "tokens": 0, "temperature": 0.0, "arrival": False}
    replayed["conclusion"] = {"sentence": ""}
    made += [part for part in tables.replay_tables(replayed) if isinstance(part, Table)]
    heads = {str(column.header) for table in made for column in table.columns}
    heads |= {head.removesuffix(", ms") for head in HEAD}
    page = (ROOT / "infer" / "measure" / "report" / "report.html.j2").read_text()
    heads |= set(re.findall(r"'([^']+)'", re.search(r"for title in \((.*?)\)", page)[1]))  # type: ignore[index]
    source = page[page.index("Acceptance by source") :]
    heads |= set(re.findall(r"<th>([^<{]+)</th>", source[: source.index("</thead>")]))
    plan = (ROOT / "infer" / "measure" / "plan" / "tables.py").read_text()
    for function in ("shape_table", "ranking_table", "needs_table"):
        body = plan[plan.index(f"def {function}") :].partition("\n\n\n")[0]
        heads |= set(
            re.findall(r'(?<!f)"([a-zA-Z0-9.\- ]+)"', "".join(re.findall(r"columns \+?= .*|table_of\(.*", body)))
        )
    return heads - {
        "drafter",
        "task",
        "answers",
        "source",
        "adds to memory",
        "cost to make",
        "runs in",
        "needs",
    }


SPEC: dict[str, Any] = {
    "by_category": {}, "pairs": 0, "tokens_per_s": None, "base_tokens_per_s": None, "over_own_plain": None,
    "speedup": None, "speedup_interval": None, "accepted_length": None,
    "spec_bench": {"speedup": None, "speedup_interval": None},
}  # fmt: skip


def test_the_numbers_page_has_every_figure_that_is_printed() -> None:
    first = "\n".join(re.findall(r"^\| ([^|]+) \|", (DOCS / "numbers.md").read_text(), re.MULTILINE))
    told = {one.strip() for line in first.splitlines() for one in re.split(r", (?!for )|, ", line)}
    heads = printed_columns()
    assert len(heads) > 30
    missing = {head for head in heads if head not in told}
    assert missing == set()


def test_the_numbers_page_has_every_figure_of_the_json() -> None:
    from draftsmith.infer.measure.metrics import trace_figures

    text = (DOCS / "numbers.md").read_text()
    missing = {key for key in trace_figures([]) if f"`{key}`" not in text}
    assert missing <= {"bytes_per_s", "step_s"}, missing


def test_figures_of_the_choosing_page_stand_in_the_readme_or_the_log() -> None:
    sources = (ROOT / "README.md").read_text() + (ROOT / "LOG.md").read_text()
    text = prose(DOCS / "choosing-a-drafter.md")
    figures = set(re.findall(r"\d+\.\d+", re.sub(r"\[\w+\.md\]\([^)]*\)", "", text)))
    assert len(figures) > 15
    settings = {"0.9", "0.7"}
    assert {one for one in figures - settings if one not in sources} == set()


def test_the_figure_is_one_file_without_anything_from_elsewhere() -> None:
    text = (DOCS / "step.svg").read_text()
    tree = ElementTree.fromstring(text)
    assert tree.tag.endswith("svg")
    assert {"title", "desc"} <= {child.tag.partition("}")[2] for child in tree}
    assert "href" not in text
    assert "<script" not in text
    assert len(text) < 20_000
