"""A head run step by step with a cache, as it drafts, for every place of a text at once that a trainer unrolls.

Legend: T pairs, W features side by side, V draft vocabulary.
"""

from __future__ import annotations

import torch

from draftsmith.infer.heads.eagle import EagleHead
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.masks import MaskPlan
from draftsmith.infer.models.runner.model_runner import ModelRunner


@torch.inference_mode()
def stepped(head: EagleHead, features_TW: torch.Tensor, tokens_T: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """The logits [T - t, V] of step t: pairs up to i are true ones, and t more are drafted with the text's tokens."""
    runner = ModelRunner(head, MaskPlan())
    total = len(tokens_T)
    whole = object()
    runner.open(whole)
    states = head.joined(dict(zip(head.features, features_TW.chunk(len(head.features), -1))))
    ids = tokens_T.tolist()
    true = Entries(ids, list(range(-1, total - 1)), head.pairs(tokens_T, states))
    output = runner.forward([whole], [true], taps=[head.recurrent])
    runner.commit([whole], [list(range(total))])
    said = [output.logits_NV]
    rows = [object() for _ in range(total)]
    fed_back = output.taps[head.recurrent]
    for i, row in enumerate(rows):
        runner.fork(whole, row, i + 1)
    for step in range(1, steps):
        rows = rows[: total - step]
        later = tokens_T[step:]
        pairs = head.pairs(later, fed_back[: len(rows)])
        entries = [Entries([int(token)], [step - 2], pair[None]) for token, pair in zip(later, pairs)]
        output = runner.forward(rows, entries, taps=[head.recurrent])
        said.append(output.logits_NV)
        fed_back = output.taps[head.recurrent]
    return said
