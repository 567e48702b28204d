"""A DReSD store on disk: a folder of raw arrays, a FAISS index, and store.json, which says what they are and belong to.

    store.json       format, kind, fingerprints, counts, calibration, provenance, size and SHA-256 of every other file
    tokens.bin       the emitted tokens of all documents in a row: uint16, or uint32 where the vocabulary needs it
    ends.bin         uint64: where each document ends in it
    projection.bin   float32: the affine map from a target state to a key
    index.faiss      the keys; the id of a key is the offset of its token in tokens.bin, so no value is stored

Key i was made from the state that predicted token i. What a state is (dresd_embed.py) and how a store is built
(dresd_build.py) are not known here; drafts are made in dresd.py.

Legend: N keys asked for, D hidden, K key dimensions, C neighbours.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from draftsmith.infer.measure.atomic import write_json
from draftsmith.retrieval.dresd_calibration import Calibration
from draftsmith.retrieval.dresd_index import read_index, set_effort
from draftsmith.retrieval.dresd_projection import Projection

FORMAT = 1
KIND = "dresd"
MANIFEST = "store.json"
FILES = ("tokens.bin", "ends.bin", "projection.bin", "index.faiss")


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write store.json last: format, kind, what the caller says, and the size and checksum of every part."""
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in FILES}
    write_json(folder / MANIFEST, {"format": FORMAT, "kind": KIND, **manifest, "files": files})


def read_manifest(folder: Path) -> dict[str, Any]:
    """store.json of a store that this version can read; one clear line where it cannot."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is not a store: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ValueError(f"{path} is damaged: it is not JSON ({problem})") from problem
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        kind = manifest.get("kind") if isinstance(manifest, dict) else None
        raise ValueError(f"{folder} is a store of kind {kind!r}, not {KIND!r}")
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{folder} has format {manifest.get('format')!r}, and this version reads {FORMAT}: "
            "bring draftsmith up to date, or build the store again"
        )
    missing = {"files", "keys", "vocab_size", "target", "feature", "calibration"} - set(manifest)
    if missing or not isinstance(manifest["files"], dict):
        raise ValueError(f"{path} is damaged: it lacks {', '.join(sorted(missing)) or 'its list of files'}")
    return manifest


def verify(folder: Path, manifest: dict[str, Any], checksums: bool = True) -> None:
    """Every part is there and whole. Without `checksums` a change that keeps a file's size goes unseen."""
    for name in FILES:
        path, said = folder / name, manifest["files"].get(name, {})
        if not path.is_file():
            raise ValueError(f"{folder} is damaged: {name} is missing")
        size = path.stat().st_size
        if size != said.get("bytes"):
            raise ValueError(f"{path} is damaged: it has {size} bytes, and was written with {said.get('bytes')}")
        if checksums and _sha256(path) != said.get("sha256"):
            raise ValueError(f"{path} is damaged: its content is not what was written (SHA-256 differs)")


class DresdStore:
    """A store that was opened: states to keys, keys to offsets, offsets to continuations. Reading changes nothing.

    Args:
        path: the folder.
        checksums: read all of it and compare checksums; without, sizes alone.
        effort: how many candidates an approximate index looks at; 0: its own default.
        threads: of a search with many queries. FAISS keeps one number for the process.
    """

    def __init__(self, path: str | Path, checksums: bool = True, effort: int = 0, threads: int = 1) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        verify(self.path, self.manifest, checksums)
        self.vocab_size = int(self.manifest["vocab_size"])
        self.tokens = _mapped(self.path / "tokens.bin", token_dtype(self.vocab_size))
        self.ends = _mapped(self.path / "ends.bin", np.dtype("<u8"))
        self.projection = Projection.read(self.path / "projection.bin", int(self.manifest["hidden_size"]))
        self.calibration = Calibration.from_json(self.manifest["calibration"])
        self.index = read_index(self.path / "index.faiss", threads)
        set_effort(self.index, effort)
        if not self.index.ntotal == len(self.tokens) == self.manifest["keys"]:
            raise ValueError(f"{self.path} is damaged: {self.index.ntotal} keys for {len(self.tokens)} tokens")

    def __len__(self) -> int:
        return len(self.tokens)

    def project(self, states_ND: torch.Tensor) -> np.ndarray:
        """[N, K]: the keys of states, of length one."""
        return self.projection.keys(states_ND)

    def search(self, keys_NK: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """[N, C] similarities, best first, and [N, C] offsets. Ties go to the smaller offset; -1 stands for none."""
        return search(self.index, keys_NK, min(count, len(self)))

    def continuation(self, offset: int, length: int) -> list[int]:
        """The tokens after the one at `offset`, at most `length`, and never beyond its document."""
        end = int(self.ends[self.ends.searchsorted(offset, side="right")])
        found: list[int] = self.tokens[offset + 1 : min(offset + 1 + length, end)].tolist()
        return found


def search(index: Any, keys_NK: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """An index's answer in an order that does not depend on it: by similarity, then by offset."""
    sims_NC, offsets_NC = index.search(np.ascontiguousarray(keys_NK, dtype=np.float32), count)
    order_NC = np.lexsort((offsets_NC, -sims_NC), axis=-1)
    return np.take_along_axis(sims_NC, order_NC, -1), np.take_along_axis(offsets_NC, order_NC, -1)


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """A plain array over the mapped file: numpy's own class for maps makes every slice several times dearer."""
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
