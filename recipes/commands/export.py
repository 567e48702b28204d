"""`draftsmith export`: a trained draft, or one exit of it, as a plain model in a folder or on the Hub."""

from __future__ import annotations

import tempfile
from json import dumps
from pathlib import Path
from typing import Literal


def export(
    checkpoint: str,
    *,
    target: str | None = None,
    exit: int | None = None,
    out: str | None = None,
    hub: str | None = None,
    private: bool = True,
    dry_run: bool = False,
    engine: Literal["vllm"] | None = None,
    dtype: str | None = None,
    bench: str | None = None,
    exits: list[int] | None = None,
    json: bool = False,
) -> None:
    """Write a draft as a plain Hugging Face model, with a model card.

    Example: draftsmith export draft --target MODEL --out draft-hf --dtype bfloat16

    Args:
        checkpoint: folder of a finished training run, a published draft, or a peft adapter.
        target: the model that it drafts for, where run.json does not tell.
        exit: leave after so many layers; the whole draft if not given.
        out: a new folder.
        hub: owner/model on the Hugging Face Hub; without --out the folder is only passed through.
        private: whether a new repository on the Hub is private.
        dry_run: show what would be uploaded, and reach no network.
        engine: vllm writes its speculative config too, and prints the line that serves it.
        dtype: of the weights; as they were trained if not given.
        bench: run folder of a benchmark whose figures go into the card.
        exits: where a published draft can be left, if its config does not tell.
        json: print one JSON object on the last line.
    """
    from draftsmith.train.export.export import check_hub_name, export_draft, upload

    if out is None and hub is None:
        raise ValueError("nowhere to export to: give --out DIR, --hub OWNER/MODEL, or both")
    if hub is not None:
        check_hub_name(hub)
    with tempfile.TemporaryDirectory() as passing:
        folder = Path(out) if out else Path(passing) / "model"
        told = export_draft(
            checkpoint, folder, exit=exit, target=target, dtype=dtype, engine=engine, bench=bench, name=hub,
            exits=exits, reach=not dry_run,
        )  # fmt: skip
        print(f"exit {told['exit']}: {', '.join(told['files'])}" + (f" in {folder}" if out else ""))
        if engine == "vllm":
            print("vLLM drafts with one exit as a chain: no exits are chosen there, and no trees are grown.")
            print(told["serve"])
        if hub and dry_run:
            kind = "private" if private else "public"
            print(f"would upload {len(told['files'])} files to the {kind} repository {hub}; README.md:")
            print((folder / "README.md").read_text(encoding="utf-8"))
        elif hub:
            told["url"] = upload(folder, hub, private=private)
            print(f"uploaded to {told['url']}")
    if json:
        print(dumps(told))
