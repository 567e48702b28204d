"""Distributions that hold no token that can be chosen, and the device of what processors compare with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from draftsmith.infer.contract.distribution import NodeDistribution, draw_by_inversion
from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.drafters.controls import Empty, oracle
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.models.hf_target import HFTarget

V = 5
WARMTHS = [0.0, 0.8]
BAN_ALL = tuple(range(V))


def distribution(settings: Settings, logits_NV: torch.Tensor | None = None, draft: Draft | None = None) -> Any:
    logits_NV = torch.zeros(3, V) if logits_NV is None else logits_NV
    return NodeDistribution(logits_NV, Row("seven", [1, 2], settings), draft or Draft().chain([3, 4], "t"), None)


@pytest.mark.parametrize("temperature", WARMTHS)
@pytest.mark.parametrize(("node", "position"), [(ROOT, 2), (1, 4)])
@pytest.mark.parametrize("ask", ["probs", "draw"])
def test_a_ban_of_all_tokens_is_an_error_that_names_row_and_position(
    temperature: float, node: int, position: int, ask: str
) -> None:
    found = distribution(Settings(temperature, suppress_tokens=BAN_ALL))
    with pytest.raises(ValueError, match=f"row seven, position {position}: all tokens are banned"):
        found.probs(node) if ask == "probs" else found.draw(node)


@pytest.mark.parametrize("temperature", WARMTHS)
@pytest.mark.parametrize(
    ("value", "reason"), [("nan", "NaN or infinite"), ("inf", "NaN or infinite"), ("-inf", "all tokens are banned")]
)
def test_logits_that_are_not_finite_are_an_error_at_the_node_that_has_them(
    temperature: float, value: str, reason: str
) -> None:
    logits_NV = torch.zeros(3, V)
    logits_NV[2, :] = float(value)
    found = distribution(Settings(temperature), logits_NV)
    assert float(found.probs(0).sum()) == pytest.approx(1)
    with pytest.raises(ValueError, match=f"row seven, position 4: .*{reason}"):
        found.draw(1)


@pytest.mark.parametrize("probs", [[0.0, 0.0], [float("nan"), 0.5], [float("inf"), 0.5]])
def test_nothing_is_drawn_from_what_is_not_a_distribution(probs: list[float]) -> None:
    with pytest.raises(ValueError, match="no token can be drawn: the probabilities sum to"):
        draw_by_inversion(torch.tensor(probs), 0.5)


@pytest.fixture(scope="module")
def model(make_model: Any) -> Any:
    return make_model("llama")


@pytest.mark.parametrize("temperature", WARMTHS)
def test_a_ban_of_all_tokens_ends_decoding_with_one_line(model: Any, temperature: float) -> None:
    settings = Settings(temperature, begin_suppress_tokens=tuple(range(61)))
    with pytest.raises(ValueError, match="row 0, position 3: all tokens are banned"):
        generate(HFTarget(model), Empty(), [Row("0", [3, 4, 5], settings, Stops(4))])


class Broken:
    """A target whose logits are `value` wherever the token before is `token`."""

    def __init__(self, model: Any, token: int, value: float) -> None:
        target = HFTarget(model)
        forward = target.lm.forward

        def breaking(rows: Any, entries: Any, *args: Any, **kwargs: Any) -> Any:
            output = forward(rows, entries, *args, **kwargs)
            wanted = args[1] if len(args) > 1 else kwargs.get("wanted")
            shown = [entry.tokens[len(entry.tokens) - count :] for entry, count in zip(entries, wanted)]
            for at, one in enumerate(one for tokens in shown for one in tokens):
                if one == token:
                    output.logits_NV = output.logits_NV.clone()
                    output.logits_NV[at] = value
            return output

        target.lm.forward = breaking  # type: ignore[method-assign]
        self.target = target


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_broken_logits_at_an_accepted_node_are_found_as_in_plain_decoding(model: Any, value: str) -> None:
    """They were seen at the prefix only: below it the argmax of NaN was taken for a token."""
    answer = generate(HFTarget(model), Empty(), [Row("0", [3, 4, 5], stops=Stops(8))])[0].token_ids
    index = next(i for i in range(2, 8) if answer[i] not in answer[:i])
    drafter = oracle(num_draft_tokens=8)
    drafter.learn({"0": answer})
    messages = []
    for one in (Empty(), drafter):
        target = Broken(model, answer[index], float(value)).target
        one.bind(target)
        with pytest.raises(ValueError, match="row 0") as caught:
            generate(target, one, [Row("0", [3, 4, 5], stops=Stops(9))])
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert f"position {3 + index + 1}" in messages[0]


def test_broken_logits_at_a_node_that_is_rejected_harm_nothing(model: Any) -> None:
    answer = generate(HFTarget(model), Empty(), [Row("0", [3, 4, 5], stops=Stops(8))])[0].token_ids
    wrong = next(token for token in range(61) if token not in answer)
    drafter = oracle(num_draft_tokens=8)
    drafter.learn({"0": [answer[0], wrong, *answer[2:]]})
    target = Broken(model, wrong, float("nan")).target
    drafter.bind(target)
    assert generate(target, drafter, [Row("0", [3, 4, 5], stops=Stops(8))])[0].token_ids == answer


EVERYTHING = Settings(
    0.9, top_k=9, top_p=0.95, min_p=0.01, typical_p=0.99, epsilon_cutoff=1e-4, eta_cutoff=1e-4, repetition_penalty=1.2,
    no_repeat_ngram_size=2, bad_words_ids=((4,), (5, 6)), suppress_tokens=(7,), begin_suppress_tokens=(8,),
    min_new_tokens=3,
)  # fmt: skip


@pytest.mark.parametrize("minimum", [{"min_new_tokens": 3}, {"min_length": 9}])
def test_processors_hold_their_tensors_on_the_logits_device(minimum: dict[str, int]) -> None:
    settings = Settings(suppress_tokens=(7,), begin_suppress_tokens=(8,), **minimum)
    row = Row("r", [1, 2], settings, Stops(9, frozenset([3])))
    made = NodeDistribution(torch.zeros(1, V, device="meta"), row, Draft(), None)._processors
    tensors = [value for one in made for value in vars(one).values() if isinstance(value, torch.Tensor)]
    assert len(made) == len(tensors) == 3
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [EVERYTHING, Settings(min_length=9, suppress_tokens=(7,))])
def test_processors_run_on_cuda_and_give_what_they_give_on_a_cpu(settings: Settings) -> None:
    logits_NV = torch.randn(3, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    draft, row = Draft().chain([3, 4], "t"), Row("r", [1, 2], settings, Stops(9, frozenset([3, 60])))
    for node in (ROOT, 0, 1):
        probs = [NodeDistribution(logits_NV.to(device), row, draft, None).probs(node) for device in ("cpu", "cuda")]
        torch.testing.assert_close(probs[1].cpu(), probs[0], rtol=0, atol=1e-12)
