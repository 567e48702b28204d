"""Trees of a draft's likeliest tokens that grow best first, by replay: the drafter itself drafts along the texts.

Which branches such a tree has depends on the probabilities of branches that the text did not take, so a pass over the
text does not say which of its tokens a tree holds. The drafts are outright, and replay is exact for them at any
temperature. The trees are those of `small` without measured costs and without a calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.drafters.draft_reader import TextReader
from draftsmith.infer.drafters.small_lm import SmallLM
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.measure.forecast.drafting import TREE_WIDTH, Drafting
from draftsmith.infer.measure.forecast.drafts import DrawsChains
from draftsmith.infer.measure.forecast.lengths import ExpectedSteps
from draftsmith.infer.measure.forecast.texts import DrawnText
from draftsmith.infer.models.recorded_target import RecordedTarget


def check_grown(label: str, drafter: DrawsChains, trees: Sequence[Drafting]) -> None:
    """ValueError if a tree that grows is asked of a draft with several exits, which has no one model to grow it."""
    grown = [tree.name for tree in trees if not tree.widths]
    if grown and not isinstance(drafter.reader, TextReader):
        raise ValueError(
            f"{label} reads the target's states, which recorded texts lack: trees that grow ({', '.join(grown)}) "
            "cannot be replayed; give the children of each node by depth, such as 4-2-1, or use `draftsmith bench`"
        )
    if grown and len(drafter.exit_sources) > 1:
        raise ValueError(
            f"{label} has several exits, and trees that grow ({', '.join(grown)}) are replayed for drafts with one: "
            "give the children of each node by depth, such as 4-2-1, or use `draftsmith replay`"
        )


def replayed_steps(
    drafter: DrawsChains, texts: Sequence[DrawnText], settings: Settings, tree: Drafting, max_new_tokens: int
) -> list[ExpectedSteps]:
    """Of each text: the steps that decoding it with this tree takes, under the limit that it was decoded with."""
    assert isinstance(drafter.reader, TextReader), "checked by check_grown"
    grown = SmallLM(
        drafter.reader.model,
        num_draft_tokens=tree.depth,
        nodes=tree.nodes,
        width=TREE_WIDTH,
        sample="likeliest",
        calibration="none",
        costs="none",
    )
    # Drafts may reach beyond the end, where nothing is accepted.
    answers = {text.key: [*text.answer, *[text.answer[-1]] * tree.depth] for text in texts}
    # The tokenizers were compared when the drafter was bound; a draft's vocabulary may be padded beyond its target's.
    target = RecordedTarget(answers, drafter.reader.draft_vocab_size, sampled=not settings.greedy)
    grown.bind(target)
    grown.reader.vocab_size = drafter.reader.vocab_size
    target.vocab_size = max(drafter.reader.vocab_size, *(token + 1 for text in texts for token in text.answer))
    # Penalties and truncations shaped the text, which is given.
    sampling = replace(Settings(), temperature=settings.temperature, seed=settings.seed)
    found = []
    with Engine(target, grown, budget=Budget(tree.nodes, tree.depth), learn=False) as engine:
        for text in texts:
            row = Row(text.key, list(text.prompt), sampling, _stops(text.answer, max_new_tokens))
            traces = engine.run([row], strict=True)[0].traces
            found.append(
                ExpectedSteps(
                    len(text.answer),
                    np.array([float(len(traces))]),
                    np.array([float(sum(trace.nodes for trace in traces))]),
                    np.array([float(sum(trace.context for trace in traces))]),
                )
            )
    return found


def _stops(answer: Sequence[int], max_new_tokens: int) -> Stops:
    """What ends the answer: its last token, if nothing shows otherwise, since drafts may reach beyond that one."""
    if len(answer) < max_new_tokens and answer[-1] not in answer[:-1]:
        return Stops(max_new_tokens, frozenset([answer[-1]]))
    return Stops(len(answer))
