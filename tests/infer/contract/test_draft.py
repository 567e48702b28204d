"""What a draft may not hold: the rule walks parents and trials without looking back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from draftsmith.infer.contract.draft import OUTRIGHT, ROOT, Draft, Trial

VOCAB = 20


def tree() -> Draft:
    """Two branches of two tokens."""
    draft = Draft()
    draft.outright(draft.outright(ROOT, 3, "a"), 4, "a")
    draft.outright(draft.outright(ROOT, 5, "a"), 6, "a")
    return draft


def foreign(draft: Draft) -> None:
    draft.trials[0].append(Trial(3, OUTRIGHT, "bad", 1.0))  # node 3 is below node 2


def at_the_root(draft: Draft) -> None:
    draft.trials[ROOT].append(Trial(1, OUTRIGHT, "bad", 1.0))


def probing(draft: Draft) -> None:
    draft.trials[ROOT].append(Trial(draft.probe(ROOT, 9), OUTRIGHT, "bad", 1.0))


def missing(draft: Draft) -> None:
    draft.trials[0].append(Trial(7, OUTRIGHT, "bad", 1.0))


def negative(draft: Draft) -> None:
    draft.trials[0].append(Trial(-1, OUTRIGHT, "bad", 1.0))


def too_deep(draft: Draft) -> None:
    draft.depths[3] = 1


def half(draft: Draft) -> None:
    draft.parents.pop()


def backwards(draft: Draft) -> None:
    draft.parents[0] = 1


def unknown(draft: Draft) -> None:
    draft.tokens[2] = VOCAB


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (foreign, "bad below node 0 names node 3, whose parent is 2"),
        (at_the_root, "bad below node -1 names node 1, whose parent is 0"),
        (probing, "names node 4, a probe"),
        (missing, "names node 7, and there are 4"),
        (negative, "names node -1"),
        (too_deep, "node 3 says that its depth is 1; it is 2"),
        (half, "4 tokens, 3 parents and 4 depths"),
        (backwards, "parents must come before their children"),
        (unknown, "token id 20, outside the target's vocabulary of 20"),
    ],
)
def test_a_draft_that_no_rule_could_verify_is_refused(spoil: Callable[[Draft], None], message: str) -> None:
    draft = tree()
    draft.check(VOCAB)
    spoil(draft)
    with pytest.raises(ValueError, match=message):
        draft.check(VOCAB)
