"""A DReSD store on disk: a token stream, keys made from a target's states, and an index of them (store_format.py).

    tokens.bin       the emitted tokens of all documents in a row: uint16, or uint32 where the vocabulary needs it
    ends.bin         uint64: where each document ends in it
    projection.bin   float32: the affine map from a target state to a key
    index.faiss      the keys; the id of a key is the offset of its token in tokens.bin, so no value is stored

Key i was made from the state that predicted token i. What a state is (dresd_embed.py) and how a store is built
(dresd_build.py) are not known here; drafts are made in dresd.py.

Legend: N keys asked for, D hidden, K key dimensions, C neighbours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from draftsmith.retrieval.dresd.calibration import SimilarityCalibration
from draftsmith.retrieval.dresd.index import read_index, set_effort
from draftsmith.retrieval.dresd.projection import Projection
from draftsmith.retrieval.store.format import MANIFEST, all_parts, check_parts, map_part, parts_from_json, read_manifest

KIND = "dresd"
TOKENS, ENDS, PROJECTION, INDEX = PARTS = ("tokens", "ends", "projection", "index")
NEEDED = {"parts", "keys", "vocab_size", "hidden_size", "target", "feature", "calibration"}


def read_dresd_manifest(path: Path) -> dict[str, Any]:
    """What store.json says, with all that a drafter needs of it."""
    said = read_manifest(path, KIND)
    if missing := sorted(NEEDED - set(said)) or [f"part {name}" for name in PARTS if name not in said["parts"]]:
        raise ValueError(f"{path / MANIFEST} is damaged: it lacks {', '.join(missing)}")
    return said


class DresdStore:
    """A store that was opened: states to keys, keys to offsets, offsets to continuations. Reading changes nothing.

    Args:
        path: the folder.
        checksums: read all of it and compare checksums; without, sizes alone.
        effort: how many candidates an approximate index looks at; 0: its own default.
        threads: of a search with many queries. FAISS keeps one number for the process.
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
