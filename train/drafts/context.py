"""What a training run gives its objective before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from draftsmith.train.data.corpus import Corpus


@dataclass(frozen=True, slots=True)
class TrainContext:
    """What a run lends its objective before the first step.

    Args:
        target: the target's model, in its own dtype; it may be moved to another device, not changed.
        draft: the model that is trained.
        corpus: all samples, held-out ones too.
        max_length: tokens of a packed row.
        device: cpu or cuda.
    """

    target: Any
    draft: Any
    corpus: Corpus
    max_length: int
    device: str
