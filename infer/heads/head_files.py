"""The files of a head: its config and its tensors, by name, in whatever container and folder they were published.

Weights are read from safetensors, else from pickles of tensors (`weights_only`). Only headers are read before a tensor
is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from torch import nn

from draftsmith.infer.files.errors import first_line
from draftsmith.infer.files.locations import may_be_on_hub
from draftsmith.infer.models.load import DTYPES

# What a folder says of a head beyond what other projects' config keys can say.
OURS = "draftsmith.json"
INDEX = "model.safetensors.index.json"
# Pickles beside a head that are not its weights.
NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
SHOWN = 4


@dataclass(frozen=True, slots=True)
class HeadFiles:
    """`config`: config.json, empty if there is none; `ours`: draftsmith.json; `shapes`: of every tensor."""

    name: str
    folder: Path
    config: dict[str, Any]
    ours: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    paths: dict[str, Path]

    @classmethod
    def open(cls, name: str | Path) -> HeadFiles:
        """The files of a folder or Hub name; ValueError in one line if they cannot be read."""
        folder = _located(str(name))
        shapes: dict[str, tuple[int, ...]] = {}
        paths: dict[str, Path] = {}
        for path in _weight_files(folder):
            for key, shape in _shapes(path).items():
                if key in shapes:
                    raise ValueError(f"{folder} holds {key} twice: in {paths[key].name} and in {path.name}")
                shapes[key], paths[key] = shape, path
        if not shapes:
            raise ValueError(f"{name} holds no weights: no .safetensors, .pt or .bin file")
        return cls(str(name), folder, _object(folder / "config.json"), _object(folder / OURS), shapes, paths)

    def read(self, names: Iterable[str], dtype: str = "auto") -> dict[str, torch.Tensor]:
        """These tensors; those of floating point in `dtype`, or as stored."""
        if dtype != "auto" and dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}: auto, {', '.join(DTYPES)}")
        by_path: dict[Path, list[str]] = {}
        for name in names:
            by_path.setdefault(self.paths[name], []).append(name)
        found: dict[str, torch.Tensor] = {}
        for path, wanted in by_path.items():
            found |= _tensors(path, wanted)
        wide = DTYPES.get(dtype)
        return {key: one.to(wide) if wide and one.is_floating_point() else one for key, one in found.items()}


def fit(module: nn.Module, tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Give `module` exactly these weights; ValueError for missing, extra and misshapen ones."""
    wanted = module.state_dict()
    if missing := sorted(set(wanted) - set(tensors)):
        raise ValueError(f"{name} lacks {_listed(missing)}: copy or download the folder again")
    if extra := sorted(set(tensors) - set(wanted)):
        raise ValueError(f"{name} has tensors that such a head does not have: {_listed(extra)}")
    for key, one in tensors.items():
        if one.shape != wanted[key].shape:
            expected, found = tuple(wanted[key].shape), tuple(one.shape)
            raise ValueError(f"{name}: {key} has the shape {found}, and by config and other tensors {expected}")
    module.load_state_dict(dict(tensors), assign=True)
    module.requires_grad_(False).eval()


def uniform(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in one dtype: where those of floating point differ, in the widest of theirs."""
    kinds = {one.dtype for one in tensors.values() if one.is_floating_point()}
    if len(kinds) < 2:
        return dict(tensors)
    widest = torch.float32
    for kind in kinds:
        widest = torch.promote_types(widest, kind)
    return {key: one.to(widest) if one.is_floating_point() else one for key, one in tensors.items()}


def _located(name: str) -> Path:
    """The folder of a name; what is on the Hub is fetched: weights as safetensors where there are any."""
    if not name or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a head: give a folder or a Hub name (owner/head)")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{name} is a file: name the folder that holds the head")
    if not may_be_on_hub(name):
        raise ValueError(f"{name} does not exist, and is not a Hub name (owner/head)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(name, allow_patterns=["*.json", "*.pt", "*.bin"]))
    except (OSError, ValueError, HfHubHTTPError) as problem:
        raise ValueError(f"{name} could not be fetched from the Hub: {first_line(problem)}") from problem
    return found


def _weight_files(folder: Path) -> list[Path]:
    index = _object(folder / INDEX)
    if index:
        names = sorted(set(index.get("weight_map", {}).values()))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ValueError(f"{folder} lacks {_listed(missing)}, which {INDEX} names: copy or download it again")
        return [folder / name for name in names]
    tensors = sorted(folder.glob("*.safetensors"))
    pickles = sorted(path for kind in ("*.pt", "*.bin") for path in folder.glob(kind))
    return tensors or [path for path in pickles if not path.name.startswith(NOT_WEIGHTS)]


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if path.suffix != ".safetensors":
        return {key: tuple(one.shape) for key, one in _pickled(path).items()}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as problem:
        raise _damaged(path, problem) from problem


def _tensors(path: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    if path.suffix != ".safetensors":
        held = _pickled(path)
        return {name: held[name] for name in names}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as problem:
        raise _damaged(path, problem) from problem


def _pickled(path: Path) -> dict[str, torch.Tensor]:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except (OSError, RuntimeError, EOFError, UnpicklingError, ValueError) as problem:
        raise _damaged(path, problem) from problem
    if not isinstance(held, dict) or not all(isinstance(one, torch.Tensor) for one in held.values()):
        raise ValueError(f"{path} holds other things than tensors by name: it is not a head's weights")
    return held


def _damaged(path: Path, problem: Exception) -> ValueError:
    return ValueError(f"{path} is damaged or incomplete ({first_line(problem)}); copy or download it again")


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ValueError(f"{path} is not JSON: {problem}") from problem
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
