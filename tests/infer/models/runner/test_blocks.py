"""Every exit of every entry has the logits of the cut model on that path, whatever ran before it, and lazily filled
blocks hold what eagerly filled ones hold."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from planted import plant

from draftsmith.infer.models.architectures import prepare
from draftsmith.infer.models.layers import first_layers
from draftsmith.infer.models.runner.arena import Arena
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.model_runner import ModelRunner

KINDS = ["llama", "mistral", "gemma2", "gemma3", "qwen3", "phi3", "mixtral", "gpt_neox", "gpt2", "opt"]
EXITS = [1, 3, 4]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, make_model: Any) -> Any:
    return make_model(request.param, **deep(request.param))


def deep(kind: str) -> dict[str, Any]:
    """Four layers, whatever a family calls that."""
    if kind == "gpt2":
        return {"n_layer": 4}
    if kind.startswith("gemma"):
        return {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    return {"num_hidden_layers": 4} | ({"layer_types": ["full_attention"] * 4} if kind == "qwen3" else {})


def lone_logits(model: Any, path: list[int], exit: int) -> torch.Tensor:
    return first_layers(model, exit).eval()(torch.tensor([path]), use_cache=False).logits[0, -1]


@pytest.mark.parametrize("seed", range(3))
@torch.inference_mode()
def test_every_exit_says_what_the_cut_model_says(model: Any, seed: int) -> None:
    # Norms of some families work in float32 whatever the dtype.
    tolerance = 2e-6 if "gemma" in model.config.model_type else 1e-12
    rng = random.Random(seed)
    lm = ModelRunner(model, prepare(model), exits=EXITS)
    texts = {name: [rng.randrange(3, 61) for _ in range(length)] for name, length in (("a", 23), ("b", 6), ("c", 41))}
    for name in texts:
        lm.open(name, 64)
    lm.prefill(list(texts), [text[:-1] for text in texts.values()], blocks=rng.randrange(1, 4))
    checked = dict.fromkeys(EXITS, 0)
    for _ in range(6):
        rows = rng.sample(list(texts), rng.randrange(1, len(texts) + 1))
        paths = {row: [] for row in rows}
        for round_ in range(2):
            entries = []
            for row in rows:
                pending = texts[row][lm.length(row) :] if round_ == 0 else []
                parents = list(range(-1, len(pending) - 1))
                tokens = list(pending)
                for i in range(len(parents)):
                    paths[row].append(texts[row][: lm.length(row) + 1 + i])
                for _ in range(rng.randrange(1, 4)):
                    parent = rng.randrange(len(texts[row]) - lm.length(row) - 1, len(paths[row]))
                    token = rng.randrange(3, 61)
                    paths[row].append([*paths[row][parent], token])
                    tokens.append(token)
                    parents.append(parent)
                entries.append(Entries(tokens, parents))
            lm.enter(rows, entries)
        for block in range(1, len(EXITS)):
            ready = {row: [e for e, seen in enumerate(lm._rows[row].passed) if seen == block] for row in rows}
            some = [row for row in rows if ready[row] and rng.random() < 0.7]
            if not some:
                break
            wanted = [rng.sample(ready[row], min(len(ready[row]), rng.randrange(1, 3))) for row in some]
            states = lm.deepen(some, block, wanted)
            for row, entries_, found in zip(some, wanted, states):
                logits = lm.logits(found)
                for entry, ours in zip(entries_, logits):
                    theirs = lone_logits(model, paths[row][entry], EXITS[block])
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
                    checked[EXITS[block]] += 1
        for row in rows:
            leaf = rng.randrange(len(texts[row]) - lm.length(row) - 1, len(paths[row]))
            path = paths[row][leaf]
            committed = lm.length(row)
            kept = [paths[row].index(path[: committed + 1 + i]) for i in range(len(path) - committed)]
            lm.commit([row], [kept])
            texts[row] = [*path, rng.randrange(3, 61)]
    assert checked[3]
    assert checked[4]


def test_rows_that_leave_hand_their_place_on(make_model: Any) -> None:
    model = make_model("llama", num_hidden_layers=4)
    lm = ModelRunner(model, prepare(model), exits=EXITS)
    for name, text in (("a", [5, 6, 7]), ("b", [9, 10, 11, 12])):
        lm.open(name, 32)
        lm.prefill([name], [text], blocks=1)
    lm.close("a")
    lm.enter(["b"], [Entries([13, 14], [-1, 0])])
    (states,) = lm.deepen(["b"], 1, [[1]])
    with torch.inference_mode():
        theirs = lone_logits(model, [9, 10, 11, 12, 13, 14], 3)
    torch.testing.assert_close(lm.logits(states)[0], theirs, rtol=0, atol=1e-12)


def check_moves(model: Any) -> None:
    """States that a shallow exit left are what a deeper one needs, after their region has moved too."""
    lm = ModelRunner(model, prepare(model), exits=EXITS)
    lm.open("a", 8)
    lm.open("b", 8)
    lm.prefill(["b", "a"], [[8, 9], [5, 6, 7]], blocks=1)
    lm.enter(["a"], [Entries([13, 14], [-1, 0])])
    moved, start = lm.cache.moved, lm._rows["a"].own.start
    lm.prefill(["b"], [[9] * 90], blocks=2)
    lm.close("b")
    lm.open("c", 400)
    lm.prefill(["c"], [[9] * 400], blocks=2)
    assert lm.cache.moved > moved
    assert lm._rows["a"].own.start != start
    (states,) = lm.deepen(["a"], 1, [[1]])
    with torch.inference_mode():
        theirs = lone_logits(model, [5, 6, 7, 13, 14], 3)
    torch.testing.assert_close(lm.logits(states)[0], theirs, rtol=0, atol=1e-12)


def test_states_outlive_the_moves_of_their_region(make_model: Any) -> None:
    check_moves(make_model("llama", num_hidden_layers=4))


@pytest.mark.parametrize(
    ("sound", "fault"),
    [
        ("(self.values, 1), (self.states, 0)", "(self.values, 1)"),
        ("copy_(old.narrow", "copy_(old.flip(dim).narrow"),
    ],
)  # fmt: skip
def test_planted_move_that_forgets_states_is_caught(
    make_model: Any, monkeypatch: pytest.MonkeyPatch, sound: str, fault: str
) -> None:
    plant(monkeypatch, Arena, "_settle", sound, fault)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check_moves(make_model("llama", num_hidden_layers=4))


def test_a_model_that_does_more_after_its_layers_is_refused(make_model: Any) -> None:
    model = make_model("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="no linear output head"):
        ModelRunner(model, prepare(model), exits=[1, 2])
