"""A checkpoint, or one of its exits, as a plain Hugging Face folder with a model card; and that folder to the Hub.

Whole folders only: it is written beside its place and renamed. How the Hub is spoken to is hub.py's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draftsmith.infer.layers import first_layers
from draftsmith.infer.models import DTYPES, load_model
from draftsmith.train.card import copy_licences, licence_folder, licence_of, model_card, serve_line, speculative_config
from draftsmith.train.checkpoint import save_model
from draftsmith.train.exits import check_exits


def export_draft(
    checkpoint: str,
    out: Path,
    *,
    exit: int | None = None,
    target: str | None = None,
    dtype: str | None = None,
    engine: str | None = None,
    bench: str | None = None,
    name: str | None = None,
    exits: Sequence[int] | None = None,
    reach: bool = True,
) -> dict[str, Any]:
    """Write `out`, a new folder; what was written, for a person or a program.

    `exit`: leave after so many layers; not given: the whole draft. `name`: what the card calls it. `exits`: where a
    published draft can be left, if its config does not tell. `reach`: the Hub may be asked for the target's licence.
    """
    if engine not in (None, "vllm"):
        raise ValueError(f"unknown engine {engine!r}: vllm")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty: give a new folder")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: {', '.join(DTYPES)}")
    run = _json(Path(checkpoint) / "run.json")
    target = target or run.get("settings", {}).get("target")
    if not target:
        raise ValueError(f"{checkpoint} has no run.json that names its target: give --target")
    model, tokenizer = _load(checkpoint, dtype)
    depth = model.config.get_text_config().num_hidden_layers
    known = getattr(model.config, "sorted_exits", None) or [depth]
    exits = list(check_exits(exits or known, depth))
    chosen = depth if exit is None else exit
    if chosen not in exits:
        raise ValueError(f"{checkpoint} has no exit {chosen}: it was trained at {', '.join(map(str, exits))}")
    fingerprint = getattr(model.config, "template_fingerprint", "")
    if chosen < depth:
        model = first_layers(model, chosen)
    exits = [number for number in exits if number <= chosen]
    if engine:
        exits = exits[-1:]
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        save_model(part, model, tokenizer, exits=exits, template_fingerprint=fingerprint)
        shown = name or out.name
        source = licence_folder(target, reach)
        licence = licence_of(source)
        results = _json(Path(bench) / "results.json") if bench else {}
        card = model_card(
            name=shown, target=target, exit=chosen, exits=exits, run=run, results=results, licence=licence
        )
        (part / "README.md").write_text(card, encoding="utf-8")
        licences = copy_licences(source, part)
        if run:
            shutil.copyfile(Path(checkpoint) / "run.json", part / "run.json")
        told: dict[str, Any] = {"exit": chosen, "exits": exits, "licence": licence, "licence_files": licences}
        if engine:
            config = speculative_config(shown)
            (part / "speculative_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            told |= {"speculative_config": config, "serve": serve_line(shown, target)}
        if out.exists():
            out.rmdir()
        os.replace(part, out)
    except OSError as error:
        raise ValueError(f"{out} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return {**told, "files": sorted(path.name for path in out.iterdir())}


def _load(checkpoint: str, dtype: str | None) -> tuple[Any, Any]:
    """The model, adapters folded in where the folder holds a peft adapter."""
    adapter = _json(Path(checkpoint) / "adapter_config.json")
    if not adapter:
        return load_model(checkpoint, dtype=dtype or "auto", device="cpu")
    from peft import PeftModel

    base, tokenizer = load_model(adapter["base_model_name_or_path"], dtype=dtype or "auto", device="cpu")
    return PeftModel.from_pretrained(base, checkpoint).merge_and_unload(), tokenizer


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}
