"""The Dockerfile, read instead of built: there need not be a docker daemon where the tests run."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from draftsmith.infer.serving.app import OpenAIApp
from draftsmith.recipes.cli.argv import normalise, options
from draftsmith.recipes.cli.main import COMMANDS, build_parser, load

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "recipes" / "docker" / "Dockerfile"
TEXT = FILE.read_text()
IGNORED = FILE.with_name("Dockerfile.dockerignore").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, the rest of its line), without comments, and lines joined that a backslash ends."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines.splitlines() if line.strip()]


def of(text: str, name: str) -> list[str]:
    return [rest for instruction, rest in instructions(text) if instruction == name]


def ignored(path: str, rules: str = IGNORED) -> bool:
    """Whether the build leaves a path out: the last rule that names it, or a folder of it, decides."""
    parts = path.split("/")
    prefixes = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    out = False
    for rule in rules.splitlines():
        if rule and not rule.startswith("#"):
            pattern = rule.removeprefix("!")
            short = pattern.removeprefix("**/")
            if any(fnmatch(one, pattern) or (short != pattern and fnmatch(one, short)) for one in prefixes):
                out = not rule.startswith("!")
    return out


def copied(text: str) -> list[str]:
    return [word for rest in of(text, "COPY") if not rest.startswith("--from") for word in rest.split()[:-1]]


def problems(text: str) -> Iterator[str]:
    """What would fail while the image is built, or when it runs."""
    for source in copied(text):
        if not (ROOT / source).exists():
            yield f"there is no {source} to copy"
        elif ignored(source):
            yield f"{source} is copied and ignored"
    project = PROJECT["project"]
    folders = PROJECT["tool"]["setuptools"]["package-dir"].values()
    for needed in ("pyproject.toml", "constraints.txt", project["readme"], *project["license-files"], *folders):
        if needed not in copied(text):
            yield f"{needed} is needed and not copied"
    for extras in re.findall(r"\.\[([\w,-]+)\]", text):
        yield from (
            f"there is no extra {one}" for one in extras.split(",") if one not in project["optional-dependencies"]
        )
    (entry,), (check,), (port,) = of(text, "ENTRYPOINT"), of(text, "HEALTHCHECK"), of(text, "EXPOSE")
    words = json.loads(entry)
    if words[:1] != list(project["scripts"]) or words[1] not in COMMANDS:
        yield f"{words[:2]} is no command"
    else:
        yield from wrong_words(words[1], words[2:])
        if words[words.index("--port") + 1] != port:
            yield "another port is exposed than served"
    url = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", check)
    if url is None or url[1] != port or url[2] not in inspect.getsource(OpenAIApp):
        yield "the health check asks for what is not served"
    if of(text, "USER")[-1:] in ([], ["root"], ["0"]):
        yield "it runs as root"
    caches = re.findall(r"(HF_HOME|DRAFTSMITH_CACHE)=(\S+)", " ".join(of(text, "ENV")))
    if len(caches) != 2 or not all(path.startswith(f"{of(text, 'VOLUME')[0]}/") for _, path in caches):
        yield "a cache lies outside the volume"


def wrong_words(command: str, words: list[str]) -> Iterator[str]:
    """Flags that the command does not take."""
    function = load(COMMANDS[command])
    known = options(function)
    parser = build_parser(command, function, known)
    try:
        parser.parse_args(normalise([*words, "--target", "T"], known))
    except Exception as problem:
        yield f"{command} takes no {words}: {problem}"


def test_nothing_would_fail():
    assert list(problems(TEXT)) == []


@pytest.mark.parametrize(
    ("was", "planted", "found"),
    [
        ("COPY retrieval retrieval", "COPY retrievals retrieval", "there is no retrievals to copy"),
        ("COPY train train\n", "", "train is needed and not copied"),
        ("COPY constraints.txt ./", "COPY constraints.txt Makefile ./", "Makefile is copied and ignored"),
        ("[serve,retrieval]", "[serving,retrieval]", "there is no extra serving"),
        ('"serve", "--host"', '"server", "--host"', "is no command"),
        ('"--host", "0.0.0.0"', '"--address", "0.0.0.0"', "serve takes no"),
        ("EXPOSE 8000", "EXPOSE 80", "another port"),
        ("8000/health", "8000/healthz", "not served"),
        ("127.0.0.1:8000/health'", "127.0.0.1:8001/health'", "not served"),
        ("USER draftsmith\n", "", "root"),
        ("=/cache/huggingface", "=/elsewhere/huggingface", "outside the volume"),
    ],
)
def test_planted_mistakes_are_found(was, planted, found):
    assert TEXT.count(was) == 1
    assert any(found in problem for problem in problems(TEXT.replace(was, planted)))


def test_every_module_of_the_package_is_copied_and_nothing_else_of_ours():
    packages = {
        name.removeprefix("draftsmith.").replace(".", "/") for name in PROJECT["tool"]["setuptools"]["packages"]
    }
    assert [folder for folder in packages if ignored(f"{folder}/__init__.py")] == []
    for path in (
        "tests/conftest.py", ".git/config", ".venv/bin/python", "recipes/studies/study.py", "runs/a/run.json",
        "infer/__pycache__/x.pyc", "infer/engine/__pycache__/engine.pyc", "quickstart/x", "secret.env",
    ):  # fmt: skip
        assert ignored(path), path


def test_the_commands_of_its_head_are_those_of_serve():
    head = re.sub(r"\\\n#\s+", "", TEXT)
    lines = re.findall(r"^#   (docker .*)", head, re.MULTILINE)
    assert len(lines) == 4
    builds = [line for line in lines if line.startswith("docker build")]
    assert all(shlex.split(line)[3] == "recipes/docker/Dockerfile" for line in builds)
    assert all(f"ARG {name}" in TEXT for line in builds for name in re.findall(r"--build-arg (\w+)=", line))
    for line in lines:
        if line.startswith("docker run"):
            words = shlex.split(line)
            image = next(at for at, word in enumerate(words) if word.partition(":")[0] == "draftsmith")
            assert list(wrong_words("serve", words[image + 1 :])) == []
