"""Drafts as plain Hugging Face folders: a finished run's model, an export with a model card, an upload to the Hub.

The config names the draft's exits (`sorted_exits`) and the template it was trained with; no code of ours is needed to
load it. Uploads use huggingface_hub's own login: no token is read, kept or printed here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draftsmith.infer.costs.identity import short_name
from draftsmith.infer.files.locations import is_hub_name, may_be_on_hub
from draftsmith.infer.files.provenance import without_secrets
from draftsmith.infer.models.layers import first_layers
from draftsmith.infer.models.load import DTYPES, check_same_tokenizer, load_model
from draftsmith.infer.text.tokenizer import TOKENIZER_FILES, load_tokenizer
from draftsmith.train.drafts.exits import check_exits
from draftsmith.train.drafts.folder import save_model
from draftsmith.train.export.card import (
    Benchmark,
    copy_licences,
    draft_model,
    licence_folder,
    licence_of,
    model_card,
    serve_line,
    sglang_line,
    speculative_config,
)

# What --engine takes. transformers' assistants are plain models.
ENGINES = ("vllm", "sglang", "speculators", "transformers")


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
    """Write the new folder `out`; returns a summary of it.

    `exit`: keep this many layers; default: the whole draft. `name`: the draft's name in the card. `exits`: those of a
    published draft whose config does not name them. `reach`: whether the Hub may be asked for the target's licence.
    """
    check_outputs(out, dtype, engine)
    if engine == "speculators":
        raise ValueError(f"{checkpoint} is a draft model: speculators has heads only")
    run = read_json(Path(checkpoint) / "run.json")
    trained_for = run.get("settings", {}).get("target")
    if target and target != trained_for and not (Path(target).expanduser().is_dir() or may_be_on_hub(target)):
        raise ValueError(f"{target} does not exist, and is not a Hub name (owner/model): give the target's folder")
    target = target or trained_for
    if not target:
        raise ValueError(f"{checkpoint} has no run.json that names its target: give --target")
    benchmark = read_benchmark(bench, target) if bench else None
    model, tokenizer = _load(checkpoint, dtype)
    compared = _compare_tokenizers(checkpoint, model, tokenizer, target, reach)
    model, chosen, exits, fingerprint = _cut(checkpoint, model, exit, exits)
    if engine:
        exits = exits[-1:]
    shown = name or out.name
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        save_model(part, model, tokenizer, exits=exits, template_fingerprint=fingerprint)
        source = licence_folder(target, reach)
        licence = licence_of(source)
        facts: dict[str, Any] = {"exit": chosen, "exits": exits, "licence": licence, "compared": compared}
        made = draft_model(shown, target, chosen, exits)
        card = model_card(
            name=shown, target=target, made=made, run=run, bench=benchmark, licence=licence, compared=compared
        )
        (part / "README.md").write_text(card, encoding="utf-8")
        facts["licence_files"] = copy_licences(source, part)
        if run:
            shutil.copyfile(Path(checkpoint) / "run.json", part / "run.json")
        if engine in ("vllm", "sglang"):
            facts |= _for_engine(part, shown, target, engine)
        if out.exists():
            out.rmdir()
        os.replace(part, out)
    except OSError as error:
        raise ValueError(f"{out} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return {**facts, "files": sorted(path.name for path in out.iterdir())}


def check_outputs(out: Path, dtype: str | None, engine: str | None) -> None:
    if engine is not None and engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}: {', '.join(ENGINES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty: give a new folder")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: {', '.join(DTYPES)}")


def read_benchmark(bench: str, target: str) -> Benchmark:
    """The figures of a run folder; ValueError if they are another target's."""
    folder = Path(bench)
    found = Benchmark(read_json(folder / "run.json"), read_json(folder / "results.json"))
    if not found.results:
        raise ValueError(f"--bench {bench} is not a finished run folder: it has no results.json")
    if found.target and short_name(found.target) != short_name(target):
        raise ValueError(f"--bench {bench} measured the target {found.target}, not {target}: give a run of {target}")
    return found


def _compare_tokenizers(checkpoint: str, model: Any, tokenizer: Any, target: str, reach: bool) -> bool:
    """Refuse a target with another tokenizer; False if the target's tokenizer is not at hand."""
    other = tokenizer_of(target, reach)
    if other is None or tokenizer is None:
        return False
    size = int(model.get_input_embeddings().weight.shape[0])
    try:
        check_same_tokenizer(tokenizer, size, other, len(other), checkpoint)
    except ValueError as error:
        raise ValueError(f"{checkpoint} cannot draft for {target}: {error}") from error
    return True


def tokenizer_of(target: str, reach: bool) -> Any | None:
    folder = Path(target).expanduser()
    if folder.is_dir():
        return load_tokenizer(folder) if any((folder / name).is_file() for name in TOKENIZER_FILES) else None
    if not is_hub_name(target):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(target, local_files_only=not reach)
    except (OSError, ValueError, KeyError):
        return None  # the card says that the tokenizers were not compared


def _cut(checkpoint: str, model: Any, exit: int | None, exits: Sequence[int] | None) -> tuple[Any, int, list[int], str]:
    """(the model of the first `exit` layers, their number, its own exits, its template's fingerprint)."""
    depth = model.config.get_text_config().num_hidden_layers
    known = list(check_exits(exits or getattr(model.config, "sorted_exits", None) or [depth], depth))
    chosen = depth if exit is None else exit
    if chosen not in known:
        raise ValueError(f"{checkpoint} has no exit {chosen}: it was trained at {', '.join(map(str, known))}")
    fingerprint = getattr(model.config, "template_fingerprint", "")
    cut = first_layers(model, chosen) if chosen < depth else model
    return cut, chosen, [number for number in known if number <= chosen], fingerprint


def _for_engine(part: Path, shown: str, target: str, engine: str) -> dict[str, Any]:
    """The command that serves both, and for vLLM its speculative config beside the model."""
    if engine == "sglang":
        return {"serve": sglang_line(shown, target, "STANDALONE")}
    config = speculative_config(shown)
    (part / "speculative_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return {"speculative_config": config, "serve": serve_line(shown, target)}


def _load(checkpoint: str, dtype: str | None) -> tuple[Any, Any]:
    """The model; if the folder holds a peft adapter, with the adapter merged."""
    adapter = read_json(Path(checkpoint) / "adapter_config.json")
    if not adapter:
        return load_model(checkpoint, dtype=dtype or "auto", device="cpu")
    from peft import PeftModel

    base, tokenizer = load_model(adapter["base_model_name_or_path"], dtype=dtype or "auto", device="cpu")
    return PeftModel.from_pretrained(base, checkpoint).merge_and_unload(), tokenizer


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def check_hub_name(name: str) -> None:
    if not is_hub_name(name):
        raise ValueError(f"{name!r} is not a Hub name: write owner/model")


def upload(folder: Path, name: str, *, private: bool) -> str:
    """Create the repository if it is missing and upload `folder`, without repeating finished files; returns its URL."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_hub_name(name)
    api = HfApi()
    try:
        url = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a draft model")
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name}: the upload failed ({without_secrets(first)}); the model is in {folder}, run the same command "
            "again"
        ) from error
    return str(url)
