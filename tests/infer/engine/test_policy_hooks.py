"""What a step asks of its policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from noting import plain

from draftsmith.infer.contract.draft import Draft
from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.retrieval import PromptLookup


def test_the_policy_is_asked_before_each_draft_and_told_what_became_of_it(make_model: Any) -> None:
    model = make_model("llama")
    target = HFTarget(model)

    class Root:
        """Leaves one node of each draft, and notes its calls."""

        def __init__(self) -> None:
            self.calls: list[str] = []

        def begin(self, rows: Sequence[Row]) -> None:
            self.calls.append("begin")

        def limits(self, rows: Sequence[Row], budgets: Sequence[Budget]) -> list[Budget]:
            self.calls.append("limits")
            return list(budgets)

        def cut(self, rows: Sequence[Row], drafts: Sequence[Draft]) -> list[Draft]:
            self.calls.append("cut")
            return [Draft().chain(draft.tokens[:1], "pld") for draft in drafts]

        def settle(self, *given: Sequence[Any]) -> None:
            assert [len(one) for one in given] == [1, 1, 1]
            self.calls.append("settle")

        def close(self, rows: Sequence[Row]) -> None:
            self.calls.append("close")

    policy, ids = Root(), [3, 4, 5, 6] * 5
    (done,) = Engine(target, PromptLookup(), policy=policy).run([Row("0", ids, stops=Stops(12))])
    assert policy.calls == ["begin", "limits", "cut", "settle"] * len(done.traces) + ["close"]
    assert max(trace.nodes for trace in done.traces) == 1
    assert done.token_ids == plain(model, ids, 12)
