"""A pass goes up as one tensor, and a greedy step comes down as one, whatever the number of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.models.architectures import prepare
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.runner.captured import CapturedPasses
from draftsmith.infer.models.runner.clock import PassClock
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.model_runner import ModelRunner
from draftsmith.infer.models.runner.transfers import Transfers
from draftsmith.retrieval import PromptLookup

# What an upload or a download looks like that does not go through Transfers. To pick by mask the number of hits must
# come down; to pick by numbers that are on the device does not wait.
UNCOUNTED = frozenset(("_local_scalar_dense", "nonzero", "index_by_mask", "is_nonzero"))


@pytest.fixture(scope="module")
def llama(make_model: Any) -> Any:
    return make_model("llama")


class Launches(TorchDispatchMode):
    """Counts the operations that are not inside what would be captured."""

    VIEWS = frozenset((
        "view", "slice", "select", "unsqueeze", "squeeze", "split", "expand", "alias", "detach", "unbind", "to",
        "as_strided", "resolve_conj", "resolve_neg", "_to_copy", "empty", "zeros",
    ))  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.inside = False
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        masks = [one for one in args[1] if one is not None and one.dtype == torch.bool] if name == "index" else []
        if not self.inside and name not in self.VIEWS:
            self.names.append("index_by_mask" if masks else name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("drafter", [Empty, PromptLookup])
def test_a_greedy_step_makes_one_download_and_at_most_two_uploads(
    llama: Any, monkeypatch: pytest.MonkeyPatch, drafter: Any, batch_size: int, static: bool
) -> None:
    """And few launches beside those of a captured pass, whatever the number of rows."""
    target, draft = HFTarget(llama), drafter()
    assert isinstance(target.lm, ModelRunner)
    assert not static or target.lm.capture()
    draft.bind(target)
    launches = Launches()
    outside = CapturedPasses.outside

    def enclosed(self: CapturedPasses, run: Callable[[], Any]) -> Any:
        launches.inside = True
        try:
            return outside(self, run)
        finally:
            launches.inside = False

    monkeypatch.setattr(CapturedPasses, "outside", enclosed)
    transfers = target.lm.transfers
    # Of each step: drafted tokens, tokens of prompts, uploads, downloads, and the names of the operations.
    steps: list[tuple[int, int, int, int, list[str]]] = []
    score, commit = target.score, target.commit

    def counted_score(rows: Any, drafts: Any) -> Any:
        launches.names = []
        drafted, read = sum(map(len, drafts)), sum(map(target.unread, rows))
        steps.append((drafted, read, transfers.uploads, transfers.downloads, launches.names))
        return score(rows, drafts)

    def counted_commit(rows: Any, verdicts: Any) -> Any:
        feedback = commit(rows, verdicts)
        drafted, read, uploads, downloads, names = steps.pop()
        steps.append((drafted, read, transfers.uploads - uploads, transfers.downloads - downloads, list(names)))
        return feedback

    monkeypatch.setattr(target, "score", counted_score)
    monkeypatch.setattr(target, "commit", counted_commit)
    text = [9, 8, 7, 6, 5]

    def decode() -> None:
        rows = [Row(str(i), [3 + i, *text * 3], Settings(), Stops(24)) for i in range(batch_size)]
        generate(target, draft, rows, batch_size=batch_size)

    decode()  # makes the buffers: a pass without them, or one that makes them larger, is not static
    steps.clear()
    with launches:
        decode()
    assert len(steps) >= 7
    assert [read for _, read, *_ in steps if read] == [15 * batch_size], "the prompts' ends are read in one step"
    assert any(drafted for drafted, *_ in steps) == (drafter is PromptLookup)
    for drafted, _, uploads, downloads, names in steps:
        assert downloads == 1
        assert uploads == 1 if drafted == 0 else uploads in (1, 2)
        assert names.count("lift_fresh") == uploads, "something is uploaded beside what is counted"
        assert UNCOUNTED.isdisjoint(names), "something is transferred beside what is counted"
        assert len(names) - uploads <= 12 or not static
    assert any(uploads == 2 for _, _, uploads, _, _ in steps) == (drafter is PromptLookup)


def test_parts_come_out_as_they_went_in() -> None:
    transfers = Transfers()
    seen = np.array([[True, False, True], [False, False, True], [True, True, True]])
    wide = np.random.default_rng(0).random((5, 13)) < 0.5
    cpu = torch.device("cpu")
    (first, none, last), (mask, other) = transfers.up_with(cpu, [seen, wide], [3, -1, 1 << 62], [], range(2))
    assert first.tolist() == [3, -1, 1 << 62]
    assert none.tolist() == []
    assert last.tolist() == [0, 1]
    assert mask.tolist() == seen.tolist()
    assert other.tolist() == wide.tolist()
    buffer = torch.full((5,), 9)
    transfers.up_into(buffer, [1, 2], np.array([4]))
    assert transfers.down(buffer) == [1, 2, 4, 9, 9]
    assert [part.tolist() for part in transfers.up(cpu, [7], [])] == [[7], []]
    assert (transfers.uploads, transfers.downloads) == (3, 1)


def test_features_and_moves_of_a_commit_go_up_together(llama: Any) -> None:
    lm = ModelRunner(llama, prepare(llama))
    lm.open("a")
    lm.prefill(["a"], [[3, 4]])
    lm.forward(["a"], [Entries([5, 6, 7], [-1, -1, 1])])
    before = lm.transfers.uploads
    assert lm.commit(["a"], [[1, 2]], [1, 2]).tolist() == [1, 2]
    assert lm.transfers.uploads == before + 1
    found_V = lm.forward(["a"], [Entries.chain([8])]).logits_NV[0]
    with torch.inference_mode():
        wanted_V = llama(torch.tensor([[3, 4, 6, 7, 8]])).logits[0, -1]
    torch.testing.assert_close(found_V, wanted_V, rtol=0, atol=1e-9)


class SlowEvent:
    """An event of a device that is behind by two events. Times are numbers of events."""

    recorded: ClassVar[list[SlowEvent]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: Any) -> None:
        self.recorded.append(self)

    def query(self) -> bool:
        return self.recorded.index(self) < len(self.recorded) - 2

    def elapsed_time(self, later: SlowEvent) -> float:
        return 1000.0 * (self.recorded.index(later) - self.recorded.index(self))


def test_passes_on_a_device_are_counted_once_they_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlowEvent, "recorded", [])
    monkeypatch.setattr(torch.cuda, "Event", SlowEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    clock = PassClock(torch.device("cuda"))
    found = []
    for _ in range(3):
        clock.end(clock.begin())
        found.append(clock.seconds)
    assert found == [0.0, 1.0, 2.0]
