"""The checks one by one, where no model has to be run."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_folders import Folders, tiny_llama

from draftsmith.infer.contract.trace import Generation, StepTrace
from draftsmith.infer.measure.doctor import rotary, weights
from draftsmith.infer.measure.doctor.acceptance import check_acceptance
from draftsmith.infer.measure.doctor.exam import WORST, gain
from draftsmith.infer.measure.doctor.exits import check_exits
from draftsmith.infer.measure.doctor.finding import Finding, lines, report, summary
from draftsmith.infer.measure.doctor.words import check_context, check_special_tokens


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_gain_that_may_be_chance_is_none() -> None:
    before = numbers(0, 400).abs() + 2
    assert gain(before, before) == 0
    assert gain(before, before + 1) == 0
    assert gain(before, before - 0.05) == 0, "too small to matter"
    assert gain(before, before - 0.5) == pytest.approx(0.5, abs=1e-5)
    noisy = before - 0.2 + 4 * numbers(1, 400)
    assert gain(before, noisy) == 0, "within three standard errors"
    assert gain(before[:1], before[:1] - 1) == 0, "of one token nothing is known"
    assert gain(before, before - 0.5, guessing=2.0) == 0, "what is mended still guesses"
    impossible = torch.full((400,), WORST)
    assert gain(torch.cat([before, impossible]), torch.cat([before - 0.5, impossible])) == pytest.approx(0.5, abs=1e-5)


def test_only_the_mend_that_gains_most_counts() -> None:
    first, second = weights.MendTried("a", 2.0, ""), weights.MendTried("b", 0.4, "")
    found = weights.likeliest({"embedding": [first], "head": [first], "rotary": [second]})
    assert [found[name][0].gained for name in ("embedding", "head", "rotary")] == [2.0, 2.0, 0.0]
    assert weights.best_of(found["rotary"]) is None


def test_a_random_table_looks_random_and_a_trained_one_does_not() -> None:
    random = numbers(0, 2000, 64) * 0.02
    assert weights.looks_random(random)
    assert weights.looks_random(torch.cat([random, torch.zeros(30, 64)])), "padding"
    common = random + 0.02 * numbers(1, 64)
    assert not weights.looks_random(common), "rows share a direction"
    uneven = random * (1 + torch.linspace(0, 2, 2000)[:, None])
    assert not weights.looks_random(uneven), "frequent tokens are shorter"
    assert not weights.looks_random(torch.zeros(100, 8))


def test_a_random_table_is_wrong_unless_the_targets_is_random_too() -> None:
    random, trained = numbers(0, 900, 32), numbers(1, 900, 48) + 3 * numbers(2, 48)
    assert weights.check_table("embedding", random, trained, None, [], 900).verdict == "wrong"
    assert weights.check_table("embedding", random, numbers(3, 900, 48), None, [], 900).verdict == "cannot tell"
    assert weights.check_table("embedding", trained, random, None, [], 900).verdict == "ok"


def test_a_table_trained_on_from_the_references_is_not_called_wrong() -> None:
    before = numbers(0, 500, 32)
    after = before + 0.8 * numbers(1, 500, 32)
    assert weights.check_table("head", after, before, before, [], 500).verdict == "cannot tell"
    assert weights.check_table("head", before.bfloat16(), before, before, [], 500).verdict == "ok"


def test_a_head_that_lost_its_embedding_is_found() -> None:
    well = Finding.ok("embedding", "the reference's")
    assert weights.check_shared(True, True, well).verdict == "ok"
    found = weights.check_shared(False, True, well)
    assert (found.check, found.verdict) == ("head", "wrong")
    assert "tie_word_embeddings true" in found.mend


def test_a_draft_of_another_run_is_not_called_wrong() -> None:
    own = {name: numbers(at, 8, 8) for at, name in enumerate("abcd")}
    other = {name: one + 0.5 for name, one in own.items()}
    assert weights.check_equal(own, other, (2, 2)).verdict == "cannot tell"
    assert weights.check_equal(own, {**own, "e": own["a"]}, (2, 4)).verdict == "ok", "an exit of the reference"
    assert weights.check_equal(own, {**own, "a": other["a"]}, (2, 2)).verdict == "wrong"
    assert weights.check_equal(own, {}, (2, 2)).verdict == "cannot tell"


def test_orders_mend_one_another_and_a_bias_is_reordered_too() -> None:
    first, second = rotary.ORDERS
    for weight in (numbers(0, 24, 5), numbers(1, 24)):
        there = rotary.in_order(weight, 8, first)
        assert not torch.equal(there, weight)
        assert torch.equal(rotary.in_order(there, 8, second), weight)


def test_mends_in_memory_are_undone() -> None:
    model = tiny_llama()
    before = {name: one.clone() for name, one in [*model.named_parameters(), *model.named_buffers()]}
    ids = torch.arange(4, 20)[None]
    plain = model(ids).logits
    tried = rotary.suspects(model, model.config, [123.0])
    assert next(what for what, _, _ in tried) == "rope_theta 10000, where 123 fits"
    for _, _, mended in tried:
        with mended():
            assert not torch.allclose(model(ids).logits, plain, atol=1e-4)
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert all(torch.equal(one, after[name]) for name, one in before.items())
    assert torch.equal(model(ids).logits, plain)


def test_a_draft_without_rotary_embeddings_passes_and_what_cannot_be_tried_is_said() -> None:
    bare = SimpleNamespace(rope_parameters=None)
    assert rotary.check_rotary(None, bare, None, bare, []).verdict == "ok"
    turned = SimpleNamespace(rope_parameters={"rope_theta": 1e4, "rope_type": "default"})
    assert rotary.check_rotary(None, turned, None, turned, []).verdict == "cannot tell"


def losses(*means: float) -> list[torch.Tensor]:
    return [mean + 0.1 * numbers(at, 200) for at, mean in enumerate(means)]


@pytest.mark.parametrize(
    ("exits", "means", "verdict", "said"),
    [
        ([1, 2, 4], (3.0, 2.0, 2.5, 1.0), "ok", "1: 3.0"),
        ([1, 3, 4], (3.0, 2.0, 2.5, 1.0), "wrong", "exit 3 predicts worse than its first 2 layers"),
        ([1, 4], (5.0, 2.0, 2.5, 1.0), "wrong", "exit 1 hardly predicts"),
        ([2, 4], (5.0, 2.0, 2.5, 1.0), "ok", "2: 2.0"),
        ([0, 4], (5.0, 2.0, 2.5, 1.0), "wrong", "must rise"),
        ([2, 2, 4], (5.0, 2.0, 2.5, 1.0), "wrong", "must rise"),
    ],
)
def test_exits_by_how_well_they_predict(exits: list[int], means: Any, verdict: str, said: str) -> None:
    found = check_exits(exits, 4, None, losses(*means), 300)
    assert (found.verdict, said in found.found) == (verdict, True), found
    assert 0.75 * math.log(300) < 5.0


def test_exits_of_a_reference_that_is_deeper() -> None:
    assert check_exits([2, 4], 4, [2, 4, 6], [], 300).verdict == "cannot tell"
    assert check_exits([3, 4], 4, [2, 4, 6], [], 300).verdict == "wrong"


def test_a_shorter_context_is_said_and_only_another_than_the_references_is_wrong() -> None:
    config = SimpleNamespace(max_position_embeddings=512)
    assert check_context(config, 512, None).verdict == "ok"
    assert "decode without drafts" in check_context(config, 2048, None).found
    assert check_context(config, 512, SimpleNamespace(max_position_embeddings=1024)).verdict == "wrong"


def test_answers_that_end_otherwise(folders: Folders) -> None:
    own = folders.tokenizer
    ends = frozenset([1, 3])
    assert check_special_tokens(own, own, SimpleNamespace(eos_token_id=[3]), ends).verdict == "ok"
    assert check_special_tokens(own, own, SimpleNamespace(eos_token_id=7), ends).verdict == "wrong"
    assert check_special_tokens(own, own, None, ends).verdict == "ok"
    other = SimpleNamespace(bos_token=None, eos_token="</s>")
    found = check_special_tokens(other, own, None, ends)  # type: ignore[arg-type]
    assert "eos_token is '</s>'" in found.found


def decoded(*steps: tuple[int, int]) -> list[Generation]:
    """Of each prompt: steps, and tokens committed by each."""
    trace = {"row": "0", "step": 0, "batch": 1, "context": 1, "nodes": 4, "trials": 4, "depth": 4}
    return [
        Generation("0", [], "eos", 1, traces=[StepTrace(**trace, accepted=each - 1, committed=each)] * count)
        for count, each in steps
    ]


def test_accepted_length_against_the_references() -> None:
    low, high = decoded(*[(6, 2)] * 10), decoded(*[(4, 3)] * 10)
    assert check_acceptance(low, high).verdict == "wrong"
    assert check_acceptance(high, high).verdict == "ok"
    assert check_acceptance(high, low).verdict == "ok", "better than its reference"
    assert check_acceptance(low, None).verdict == "ok"
    assert check_acceptance(decoded(*[(6, 1)] * 10), None).verdict == "wrong"
    assert check_acceptance(low[:2], high[:2]).verdict == "wrong"
    assert check_acceptance(decoded((0, 1)), None).verdict == "cannot tell"


def test_findings_as_lines_and_as_json() -> None:
    found = [
        Finding.ok("files", "well"),
        Finding.wrong("rotary", "word " * 30, "do this"),
        Finding.unknown("exits", "not measured"),
    ]
    shown = lines(found, 60)
    assert max(map(len, shown)) <= 60
    assert [line.split()[0] for line in shown if not line.startswith(" ")] == ["ok", "wrong", "cannot"]
    assert any(line.strip() == "mend: do this" for line in shown)
    assert summary(found) == "1 of 3 checks found something wrong: rotary; it cannot tell about exits"
    assert summary(found[:1]) == "nothing wrong was found in 1 checks"
    assert report(found, {"draft": "d"})["wrong"] == ["rotary"]
    assert report(found, {})["findings"][0] == {"check": "files", "verdict": "ok", "found": "well", "mend": ""}
