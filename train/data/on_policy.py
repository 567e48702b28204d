"""On-policy rows: the draft answers itself, and learns what the target would have said there.

Drafts are asked in contexts that the target wrote, but inside a draft they continue their own tokens, and their
mistakes add up (DistillSpec, arXiv 2310.08461; on-policy distillation, 2306.13649). In every document of such a row
the first learned answer is sampled anew from the current draft, up to its old length or an end token; nothing after it
is learned. The choice of rows and every draw depend only on the seed and the row's number in the run, so a resumed run
draws the same, on however many ranks.

Legend: B rows, T positions.
"""

from __future__ import annotations

from typing import Any

import torch

from draftsmith.infer.contract.rng import uniform
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.train.data.batches import IGNORED, Batch

ROWS_AT_ONCE = 32


class OnPolicy:
    """Rewrites `share` of the rows with the draft sampled at `temperature`."""

    def __init__(self, share: float, temperature: float, seed: int) -> None:
        check_share(share)
        self.share = share
        self.settings = Settings(temperature=temperature, seed=seed)
        self.seed = seed
        self._decoder: HFTarget | None = None

    def __call__(self, model: Any, batch: Batch) -> Batch:
        """`batch`, or a copy with answers by `model`. Batches without a number (held-out ones) are never on-policy."""
        if "number" not in batch or not self.share:
            return batch
        numbers = batch["rows"].tolist()
        chosen = {b for b, row in enumerate(numbers) if uniform(self.seed, "row", row, "on-policy") < self.share}
        if not chosen:
            return batch
        training = model.training
        device = batch["labels"].device
        if self._decoder is None or self._decoder.model is not model:
            self._decoder = HFTarget(model)
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                return self._rewritten(self._decoder, batch, numbers, chosen)
        finally:
            model.train(training)

    def _rewritten(self, decoder: HFTarget, batch: Batch, numbers: list[int], chosen: set[int]) -> Batch:
        decoder.model.eval()
        ids_BT, labels_BT = batch["input_ids"].clone(), batch["labels"].clone()
        labels_BT[sorted(chosen)] = IGNORED
        spans = [span for span in answer_spans(batch) if span[0] in chosen]
        rows = [
            Row(f"{numbers[b]}-{first}", ids_BT[b, start : first + 1].tolist(), self.settings,
                Stops(count, decoder.eos_ids))
            for b, start, first, count in spans
        ]  # fmt: skip
        done = Engine(decoder, batch_size=ROWS_AT_ONCE).run(rows, strict=True)
        for (b, _, first, _), answer in zip(spans, done):
            new = torch.tensor(answer.token_ids, device=ids_BT.device)
            labels_BT[b, first : first + len(new)] = new
            ids_BT[b, first + 1 : first + 1 + len(new)] = new
        return {**batch, "input_ids": ids_BT, "labels": labels_BT}


def check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"on_policy is {share}: give a share of the rows, from 0 to 1")


def answer_spans(batch: Batch) -> list[tuple[int, int, int, int]]:
    """Per document: (row, its start, the position before its first learned token, length of the learned run)."""
    spans = []
    positions_BT, learned_BT = batch["position_ids"].tolist(), (batch["labels"] != IGNORED).tolist()
    for b, (positions_T, learned_T) in enumerate(zip(positions_BT, learned_BT)):
        starts = [t for t, position in enumerate(positions_T) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(positions_T)]):
            first = next((t for t in range(start, end) if learned_T[t]), None)
            if first is None:
                continue
            last = first
            while last < end and learned_T[last]:
                last += 1
            spans.append((b, start, first, last - first))
    return spans
