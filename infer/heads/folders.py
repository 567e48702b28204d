"""Heads in folders and on the Hub: load_* reads what people have, save_* writes what engines and we read again.

Loaded heads are in eval mode and need no gradients. A folder that was written here holds `draftsmith.json` as well:
which states the head reads, and whose they are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from uuid import uuid4

import torch

from draftsmith.infer.files.atomic import write_json
from draftsmith.infer.heads.eagle import EagleHead
from draftsmith.infer.heads.eagle_export import Layout, eagle_config, eagle_tensors, speculators_config
from draftsmith.infer.heads.eagle_folder import read_eagle
from draftsmith.infer.heads.head_files import OURS, HeadFiles
from draftsmith.infer.heads.hydra import HydraHeads
from draftsmith.infer.heads.hydra_folder import hydra_config, hydra_tensors, read_hydra
from draftsmith.infer.heads.medusa import MedusaHeads
from draftsmith.infer.heads.medusa_folder import BLOCK, PREFIX, VLLM_BLOCK, medusa_config, medusa_tensors, read_medusa

Kind = Literal["eagle", "medusa", "hydra"]
FORMAT = 1


@dataclass(frozen=True, slots=True)
class TrainedFor:
    """Whose states a head reads: its target's name, the fingerprint of its weights, that of its tokenizer, and its
    number of layers, and its class in transformers; "" and 0 where it is unknown."""

    name: str = ""
    fingerprint: str = ""
    tokenizer: str = ""
    num_layers: int = 0
    architecture: str = ""


def load_eagle(name: str | Path, target_config: Any | None = None, dtype: str = "auto") -> EagleHead:
    """An EAGLE head. `target_config`: needed where the folder does not say which states the head reads; checked."""
    return read_eagle(_opened(name, "eagle"), target_config, dtype)


def load_medusa(name: str | Path, target_config: Any | None = None, dtype: str = "auto") -> MedusaHeads:
    return read_medusa(_opened(name, "medusa"), target_config, dtype)


def load_hydra(name: str | Path, target_config: Any | None = None, dtype: str = "auto") -> HydraHeads:
    return read_hydra(_opened(name, "hydra"), target_config, dtype)


def save_eagle(
    folder: Path,
    head: EagleHead,
    trained_for: TrainedFor | None = None,
    layout: Layout = "flat",
    num_draft_tokens: int = 5,
) -> None:
    """Write the flat format, in which vLLM and SGLang take heads, or speculators', which names the number of draft
    tokens too."""
    target = trained_for or TrainedFor()
    if layout == "flat":
        config = eagle_config(head, target.num_layers)
    else:
        config = speculators_config(
            head, target.name, [target.architecture] if target.architecture else [], num_draft_tokens
        )
    _save(folder, "eagle", eagle_tensors(head, layout), config, {"features": list(head.features)}, trained_for)


def save_medusa(folder: Path, heads: MedusaHeads, trained_for: TrainedFor | None = None) -> None:
    """Write Medusa's v0.1."""
    config = medusa_config(heads, trained_for.name if trained_for else "")
    _save(folder, "medusa", medusa_tensors(heads), config, {}, trained_for, "medusa_lm_head.safetensors")


def save_hydra(folder: Path, heads: HydraHeads, trained_for: TrainedFor | None = None) -> None:
    config = hydra_config(heads, trained_for.name if trained_for else "")
    _save(folder, "hydra", hydra_tensors(heads), config, {}, trained_for, "hydra_lm_head.safetensors")


def kind_of(folder: str | Path) -> Kind | None:
    """What head a local folder holds; None for anything else, and for what cannot be read."""
    if not Path(folder).expanduser().is_dir():
        return None
    try:
        return _kind(HeadFiles.open(folder))
    except ValueError:
        return None


def trained_for(name: str | Path) -> TrainedFor | None:
    """Whose states a head reads, if its folder was written here."""
    noted = HeadFiles.open(name).ours.get("target")
    return TrainedFor(**noted) if isinstance(noted, dict) else None


def _opened(name: str | Path, wanted: Kind) -> HeadFiles:
    files = HeadFiles.open(name)
    kind = _kind(files)
    if kind != wanted:
        use = f"{kind}:{name}" if kind else f"small:{name}"
        what = f"a folder of {kind} heads" if kind else "no folder of a head"
        raise ValueError(f"{name} is {what}, not of {wanted}: use {use}")
    return files


def _kind(files: HeadFiles) -> Kind | None:
    names = files.shapes
    if any(name.startswith(("hydra_mlp.", "hydra_lm_head.")) for name in names):
        return "hydra"
    if any(name.startswith(PREFIX) or BLOCK.fullmatch(name) or VLLM_BLOCK.fullmatch(name) for name in names):
        return "medusa"
    if any(name.removeprefix("model.") == "fc.weight" for name in names):
        return "eagle"
    return None


def _save(
    folder: Path,
    kind: Kind,
    tensors: Mapping[str, torch.Tensor],
    config: dict[str, Any],
    notes: dict[str, Any],
    origin: TrainedFor | None,
    weights: str = "model.safetensors",
) -> None:
    """Write beside the place, then move in, config.json last."""
    from safetensors.torch import save_file

    assert kind in get_args(Kind)
    part = folder / f".head.{uuid4().hex}.part"
    try:
        part.mkdir(parents=True)
        # A tensor that several names share is written under each.
        whole = {name: one.detach().cpu().contiguous().clone() for name, one in tensors.items()}
        save_file(whole, part / weights, metadata={"format": "pt"})
        write_json(part / OURS, {"kind": "head", "format": FORMAT, "head": kind, **notes} | _noted(origin))
        write_json(part / "config.json", config)
        for path in sorted(part.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)
    except OSError as error:
        raise ValueError(f"{folder}: the head could not be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _noted(origin: TrainedFor | None) -> dict[str, Any]:
    return {"target": asdict(origin)} if origin is not None else {}
