"""`draftsmith export`: a trained draft, one exit of it, or a head, in a folder or on the Hub, as engines take it."""

from __future__ import annotations

import sys
import tempfile
from json import dumps
from pathlib import Path
from typing import Any, Literal

from draftsmith.recipes.cli.ranges import IntFrom1


def export(
    checkpoint: str,
    *,
    target: str | None = None,
    exit: IntFrom1 | None = None,
    out: str | None = None,
    hub: str | None = None,
    private: bool = True,
    dry_run: bool = False,
    engine: Literal["vllm", "sglang", "speculators", "transformers"] | None = None,
    dtype: str | None = None,
    bench: str | None = None,
    exits: list[IntFrom1] | None = None,
    json: bool = False,
) -> None:
    """Write a draft model as a plain Hugging Face model, or a head in the format of an engine, with a model card.

    EAGLE-3 heads go to vLLM and SGLang in one format; what an engine would not read in a head, and so draft something
    else, is refused. Medusa's are written as v0.1, which TGI and TensorRT-LLM read; Hydra's only Draftsmith reads.

    Example: draftsmith export draft --target MODEL --out draft-hf --dtype bfloat16

    Args:
        checkpoint: folder of a finished training run, a published draft or head, or a peft adapter.
        target: the model that it drafts for, if run.json does not name it.
        exit: keep this many layers; all by default.
        out: new folder for the model.
        hub: owner/model to upload to on the Hugging Face Hub; without --out no local copy is kept.
        private: make a new repository on the Hub private.
        dry_run: show what would be uploaded, without using the network.
        engine: the one that the folder is for; prints the command that serves it, and for vllm writes its speculative
            config.
        dtype: type of the weights; by default as trained.
        bench: run folder of `draftsmith bench`, whose figures go into the model card.
        exits: the exits of a published draft, if its config does not list them.
        json: print one JSON object on the last line.
    """
    from draftsmith.infer.files.locations import check_writable
    from draftsmith.infer.heads.folders import kind_of
    from draftsmith.train.export.export import check_hub_name, export_draft, upload
    from draftsmith.train.export.head import export_head

    if out is None and hub is None:
        raise ValueError("nowhere to export to: give --out DIR, --hub OWNER/MODEL, or both")
    if hub is not None:
        check_hub_name(hub)
    if out is not None:
        check_writable(out, folder=True)
    kind = kind_of(checkpoint)
    if kind and (exit or exits):
        raise ValueError(f"{checkpoint} holds {kind} heads, which have no exits: leave --exit and --exits out")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(out) if out else Path(temporary) / "model"
        named: dict[str, Any] = {"target": target, "dtype": dtype, "engine": engine, "bench": bench, "name": hub}
        if kind:
            facts = export_head(checkpoint, folder, kind, reach=not dry_run, **named)
        else:
            facts = export_draft(checkpoint, folder, exit=exit, exits=exits, reach=not dry_run, **named)
        what = f"{kind} head" if kind else f"exit {facts['exit']}"
        print(f"{what}: {', '.join(facts['files'])}" + (f" in {folder}" if out else ""))
        if not facts["compared"]:
            print(
                "warning: the target's tokenizer was not at hand, so it was not compared with the draft's",
                file=sys.stderr,
            )
        if engine == "vllm" and not kind:
            print("vLLM drafts chains from this one exit: it does not choose exits or draft trees.")
        if "serve" in facts:
            print(facts["serve"])
        if hub and dry_run:
            visibility = "private" if private else "public"
            print(f"would upload {len(facts['files'])} files to the {visibility} repository {hub}; README.md:")
            print((folder / "README.md").read_text(encoding="utf-8"))
        elif hub:
            facts["url"] = upload(folder, hub, private=private)
            print(f"uploaded to {facts['url']}")
    if json:
        print(dumps(facts))
