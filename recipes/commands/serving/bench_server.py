"""`draftsmith bench --server URL`: a server under load, by the number of concurrent requests."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from draftsmith.infer.answers.server_client import Server
    from draftsmith.infer.contract.sampling import Settings
    from draftsmith.infer.measure.runners import Question

# The options of `bench` that make sense with a server, and those that make sense with one only.
WITH_SERVER = (
    "data",
    "limit",
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "repeats",
    "warmup",
    "out",
    "json",
)
SERVER_ONLY = ("server", "plain_server", "model", "api_key_file", "concurrency")
# Names in tables and files.
SERVER, PLAIN = "server", "plain"


def check_options(bench: Callable[..., Any], config: Mapping[str, Any]) -> None:
    """Refuse options that mean nothing with a server, or nothing without one."""
    defaults = {name: one.default for name, one in inspect.signature(bench).parameters.items()}
    changed = [name for name, value in config.items() if _listed(value) != _listed(defaults[name])]
    if config["server"] is None:
        if alone := [name for name in SERVER_ONLY if name in changed]:
            raise ValueError(f"{_flags(alone)}: with --server only")
        if config["target"] is None:
            raise ValueError("give either --target or --server")
        return
    if config["target"] is not None:
        raise ValueError("give either --target or --server")
    if others := [name for name in changed if name not in (*WITH_SERVER, *SERVER_ONLY)]:
        raise ValueError(f"{_flags(others)}: with --target only, a server decides that itself")


def _flags(names: Sequence[str]) -> str:
    return ", ".join(f"--{name}" for name in names)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def bench_server(config: dict[str, Any], questions: Callable[[], list[Question]]) -> int:
    """Measure, show, and write the run folder; `config` holds the options of `bench`."""
    from draftsmith.infer.contract.sampling import resolve_settings
    from draftsmith.infer.files.provenance import provenance, without_secrets
    from draftsmith.infer.measure import tables
    from draftsmith.infer.measure.run_folder import RunFolder
    from draftsmith.infer.measure.served.answers import write_load
    from draftsmith.infer.measure.served.figures import summarise_load
    from draftsmith.infer.measure.served.load import check, measure
    from draftsmith.infer.measure.served.tables import served_tables
    from draftsmith.recipes.cli.progress import progress
    from draftsmith.recipes.commands.report import report_beside

    servers = _servers(config)
    settings = resolve_settings(None, **{name: config[name] for name in ("temperature", "top_k", "top_p", "seed")})
    folder = RunFolder.create(config["out"]) if config["out"] else None
    asked, concurrency = questions(), list(config["concurrency"])
    check(asked, concurrency)
    # Another server may give the same model another name.
    servers = {name: _ready(one, config["model"] if name == SERVER else "", settings) for name, one in servers.items()}
    kept = {name: config[name] for name in (*SERVER_ONLY, *WITH_SERVER)}
    facts = provenance(sys.argv, kept, config["seed"]) | {"sampling": settings.to_json()}
    load = measure(
        servers, asked, settings, config["max_new_tokens"], concurrency=concurrency, repeats=config["repeats"],
        warmup=config["warmup"], progress=lambda line, last: progress(line, last=last),
    )  # fmt: skip
    known = {name: without_secrets({"url": one.url, "model": one.model}) for name, one in servers.items()}
    results = summarise_load(load, known, PLAIN if PLAIN in servers else None)
    if folder:
        write_load(folder, load, facts, results)
        report_beside(folder.path)
    if config["json"]:
        print(dumps(results, ensure_ascii=False))
    else:
        tables.show(served_tables(results, kept))
    if failed := load.all_failed():
        print(f"draftsmith bench: every request failed: {failed}", file=sys.stderr)
    return int(bool(failed))


def _servers(config: Mapping[str, Any]) -> dict[str, Server]:
    from draftsmith.infer.answers.server_client import Server

    key = os.environ.get("OPENAI_API_KEY", "")
    if config["api_key_file"]:
        path = Path(os.path.expanduser(config["api_key_file"]))
        key = next(iter(path.read_text(encoding="utf-8").split()), "")
        if not key:
            raise ValueError(f"--api_key_file: {path} holds no key")
    found = {SERVER: Server(config["server"], api_key=key)}
    if config["plain_server"] is not None:
        found[PLAIN] = Server(config["plain_server"], api_key=key)
        if found[PLAIN].root == found[SERVER].root:
            raise ValueError("--plain_server is --server: name one that serves the same model without drafts")
    return found


def _ready(server: Server, model: str, settings: Settings) -> Server:
    """The server with the model to ask for, after a short request; ValueError if it cannot be measured."""
    from draftsmith.infer.answers.server_client import RefusedError
    from draftsmith.infer.measure.served.load import find_model, probe

    try:
        found = replace(server, model=find_model(server, model))
        probe(found, settings)
    except RefusedError as problem:
        if problem.status in (401, 403):
            raise ValueError(f"{problem}; --api_key_file gives the key") from problem
        raise
    return found
