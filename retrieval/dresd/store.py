"""A DReSD store on disk: a token stream, keys made from a target's states, and an index of the keys.

    tokens.bin       the emitted tokens of all documents in a row: uint16, or uint32 for larger vocabularies
    ends.bin         uint64: where each document ends in it
    projection.bin   float32: the affine map from a target's state to a key
    index.faiss      the keys; a key's id is the offset of its token in tokens.bin, so no value is stored
    index.lists      the lists of compressed cells, if they are kept on disk

Key i was made from the state that predicted token i.

Legend: N queries, D hidden, K key dimensions, C neighbours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from draftsmith.retrieval.dresd.calibration import SimilarityCalibration
from draftsmith.retrieval.dresd.index import read_index, search, set_effort
from draftsmith.retrieval.dresd.projection import Projection
from draftsmith.retrieval.store.format import MANIFEST, all_parts, check_parts, map_part, parts_from_json, read_manifest

KIND = "dresd"
TOKENS, ENDS, PROJECTION, INDEX = PARTS = ("tokens", "ends", "projection", "index")
LISTS = "lists"
NEEDED = {"parts", "keys", "vocab_size", "hidden_size", "target", "feature", "calibration"}


def read_dresd_manifest(path: Path) -> dict[str, Any]:
    """store.json, parsed; ValueError if it lacks something that a drafter needs."""
    manifest = read_manifest(path, KIND)
    if missing := sorted(NEEDED - set(manifest)) or [f"part {name}" for name in PARTS if name not in manifest["parts"]]:
        raise ValueError(f"{path / MANIFEST} is damaged: it lacks {', '.join(missing)}; build the store again")
    return manifest


class DresdStore:
    """An open store: states to keys, keys to offsets, offsets to continuations.

    Args:
        path: the folder.
        checksums: compare the whole store with its checksums, instead of checking file sizes only.
        effort: how many candidates an approximate index examines; 0 for its default.
        threads: of a search with many queries. FAISS has one setting per process.
    """

    def __init__(self, path: str | Path, checksums: bool = True, effort: int = 0, threads: int = 1) -> None:
        self.path = Path(path).expanduser()
        self.manifest = read_dresd_manifest(self.path)
        check_parts(self.path, all_parts(self.manifest), "checksums" if checksums else "sizes")
        parts = parts_from_json(self.manifest["parts"])
        self.vocab_size = int(self.manifest["vocab_size"])
        self.tokens, self.ends = map_part(self.path, parts[TOKENS]), map_part(self.path, parts[ENDS])
        self.projection = Projection.read(self.path / parts[PROJECTION].file, int(self.manifest["hidden_size"]))
        self.calibration = SimilarityCalibration.from_json(self.manifest["calibration"])
        self.index = read_index(self.path / parts[INDEX].file, threads)
        set_effort(self.index, effort)
        if not self.index.ntotal == len(self.tokens) == self.manifest["keys"]:
            raise ValueError(
                f"{self.path} is damaged: {self.index.ntotal} keys for {len(self.tokens)} tokens; build it again"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    def project(self, states_ND: torch.Tensor) -> np.ndarray:
        """[N, K]: the unit-length keys of states."""
        return self.projection.keys(states_ND)

    def search(self, keys_NK: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """[N, C] similarities, best first, and [N, C] offsets, -1 where there is none. The smaller offset wins ties."""
        return search(self.index, keys_NK, min(count, len(self)))

    def continuation(self, offset: int, length: int) -> list[int]:
        """Up to `length` tokens after the one at `offset`, within its document."""
        end = int(self.ends[self.ends.searchsorted(offset, side="right")])
        found: list[int] = self.tokens[offset + 1 : min(offset + 1 + length, end)].tolist()
        return found


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
