"""Each planted fault of a head is found by its own check, and the other checks stay ok."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ill_folders import (
    absolute_d2t,
    entries,
    ill,
    layers_moved,
    overflowing_head,
    permuted_rotary,
    shifted_d2t,
    sit,
    verdicts,
    without_d2t,
    wrong,
    zero_d2t,
)
from tiny_eagle import fitted_eagle, tiny_eagle
from tiny_folders import Folders, save, tiny_llama
from tiny_heads import fitted

from draftsmith.infer.heads.folders import TrainedFor, save_eagle, save_hydra, save_medusa
from draftsmith.infer.measure.doctor.exam import Exam
from draftsmith.infer.measure.doctor.head import examine_head
from draftsmith.infer.text.tokenizer import tokenizer_fingerprint

CONSEQUENCE = {"accepted_length"}
FEATURES = ("layer:1", "layer:2", "layer:3")


@pytest.fixture(scope="module")
def deep(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Exam:
    """A target of four layers: the states before and after each differ."""
    folder = save(tmp_path_factory.mktemp("deep") / "target", tiny_llama(num_hidden_layers=4), folders.tokenizer)
    return sit(folder, 10, 24)


@pytest.fixture(scope="module")
def heads(deep: Exam, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Heads of each kind, fitted to the target's answers, as our trainer saves them."""
    root = tmp_path_factory.mktemp("heads")
    assert deep.target.tokenizer is not None
    print_ = tokenizer_fingerprint(deep.target.tokenizer)
    origin = TrainedFor(deep.name, deep.target.fingerprint(), print_, 4, "LlamaForCausalLM")
    texts = [one.prompt + one.answer for one in deep.answers]
    ids = [token for token in range(299) if token % 12]  # not the last, so that all can be shifted
    head = tiny_eagle(features=FEATURES, vocab=300, ids=ids)
    save_eagle(root / "eagle", fitted_eagle(head, copy.deepcopy(deep.model).double(), texts, 40).float(), origin)
    save_medusa(root / "medusa", fitted("medusa", deep.model, texts), origin)
    save_hydra(root / "hydra", fitted("hydra", deep.model, texts), origin)
    return {kind: str(root / kind) for kind in ("eagle", "medusa", "hydra")}


@pytest.mark.parametrize("kind", ["eagle", "medusa", "hydra"])
def test_healthy_heads_pass_and_equal_themselves(deep: Exam, heads: dict[str, str], kind: Any) -> None:
    alone = examine_head(heads[kind], kind, deep)
    assert {one.check: one.found for one in alone if one.verdict != "ok"} == {}
    length = next(one.found for one in alone if one.check == "accepted_length")
    assert float(length.split()[0]) > 1.2, "a healthy head that nothing accepts shows nothing"
    compared = examine_head(heads[kind], kind, deep, heads[kind])
    assert {one.check: one.found for one in compared if one.verdict != "ok"} == {}
    assert "weights" in verdicts(compared)


FAULTS: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
    "no d2t": (without_d2t, {}, {"draft vocabulary"}),
    "d2t of zeros": (zero_d2t, {}, {"draft vocabulary"}),
    "d2t shifted by one": (shifted_d2t, {}, {"draft vocabulary"}),
    "d2t that holds ids": (absolute_d2t, {}, {"draft vocabulary"}),
    "layer ids one too high": (None, {"draftsmith.json": layers_moved(1)}, {"layers read"}),
    "layer ids one too low": (None, {"draftsmith.json": layers_moved(-1)}, {"layers read"}),
    "permuted rotary weights": (permuted_rotary, {}, {"rotary"}),
}
# Other checks that say nothing certain beside them: of a head that does not load, or whose map leaves much open.
UNCERTAIN = {"d2t of zeros": {"assumed"}}
UNCERTAIN |= {fault: {"dtype", "accepted_length"} for fault in ("no d2t", "d2t that holds ids")}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_by_its_own_check(
    deep: Exam, heads: dict[str, str], tmp_path: Path, fault: str
) -> None:
    weights, files, expected = FAULTS[fault]
    found = examine_head(ill(heads["eagle"], tmp_path / "ill", weights, files), "eagle", deep)
    assert wrong(found) - CONSEQUENCE == expected, found
    unknown = {check for check, verdict in verdicts(found).items() if verdict == "cannot tell"}
    assert unknown <= UNCERTAIN.get(fault, set())
    assert all(one.mend for one in found if one.verdict == "wrong")


@pytest.mark.parametrize("fault", ["layer ids one too high", "permuted rotary weights"])
def test_a_reference_shows_it_too(deep: Exam, heads: dict[str, str], tmp_path: Path, fault: str) -> None:
    weights, files, expected = FAULTS[fault]
    place = ill(heads["eagle"], tmp_path / "ill", weights, files)
    found = examine_head(place, "eagle", deep, heads["eagle"])
    assert wrong(found) - CONSEQUENCE == expected, found
    assert "the reference" in next(one.found for one in found if one.check in expected)


def test_layer_ids_that_may_mean_two_things_are_no_traceback(deep: Exam, heads: dict[str, str], tmp_path: Path) -> None:
    def unsaid(held: dict[str, Any]) -> None:
        del held["features"]

    ids = entries(eagle_aux_hidden_state_layer_ids=[3, 3, 3])
    found = examine_head(
        ill(heads["eagle"], tmp_path / "ill", None, {"draftsmith.json": unsaid, "config.json": ids}), "eagle", deep
    )
    assert wrong(found) == {"layers read"}


def test_another_targets_head_is_found_by_its_weights_fingerprint(
    heads: dict[str, str], folders: Folders, tmp_path: Path
) -> None:
    other = sit(save(tmp_path / "other", tiny_llama(num_hidden_layers=4, seed=7), folders.tokenizer), 4, 12)
    for kind, folder in heads.items():
        found = examine_head(folder, kind, other)  # type: ignore[arg-type]
        assert "target" in wrong(found) <= {"target"} | CONSEQUENCE, found


def test_another_targets_head_is_found_by_its_shape(heads: dict[str, str], folders: Folders, tmp_path: Path) -> None:
    wide = sit(save(tmp_path / "wide", tiny_llama(hidden_size=64, num_hidden_layers=4), folders.tokenizer), 2, 6)
    for kind, folder in heads.items():
        found = examine_head(folder, kind, wide)  # type: ignore[arg-type]
        assert wrong(found) == {"target"}, found
        assert verdicts(found)["tokenizer"] == "ok", "what needs no loaded head goes on"


def test_another_tokenizers_head(deep: Exam, heads: dict[str, str], tmp_path: Path) -> None:
    def planted(held: dict[str, Any]) -> None:
        held["target"]["tokenizer"] = "0" * 64

    found = examine_head(ill_of(heads["hydra"], tmp_path / "ill", planted), "hydra", deep)
    assert wrong(found) == {"tokenizer"}


def ill_of(folder: str, place: Path, change: Callable[[dict[str, Any]], None]) -> str:
    return ill(folder, place, None, {"draftsmith.json": change})


def test_a_head_that_says_nothing_of_its_target_is_tried_all_the_same(
    deep: Exam, heads: dict[str, str], tmp_path: Path
) -> None:
    place = ill_of(heads["eagle"], tmp_path / "ill", lambda held: held.pop("target"))
    found = verdicts(examine_head(place, "eagle", deep))
    assert {check for check, verdict in found.items() if verdict != "ok"} == {"target", "tokenizer"}
    assert (found["target"], found["tokenizer"]) == ("cannot tell", "cannot tell")


def test_half_precision_that_overflows(deep: Exam, heads: dict[str, str], tmp_path: Path) -> None:
    half = sit(deep.name, 2, 8, "float16")
    assert verdicts(examine_head(heads["eagle"], "eagle", half))["dtype"] == "ok"
    found = examine_head(ill(heads["eagle"], tmp_path / "ill", overflowing_head), "eagle", half)
    assert "dtype" in wrong(found) <= {"dtype"} | CONSEQUENCE, found
    assert verdicts(examine_head(str(tmp_path / "ill"), "eagle", deep))["dtype"] == "ok", "in float32 it is well"


def test_a_weight_that_is_not_a_number(deep: Exam, heads: dict[str, str], tmp_path: Path) -> None:
    place = tmp_path / "ill"

    def planted(tensors: dict[str, torch.Tensor]) -> None:
        tensors["0.0.linear.weight"][0, 0] = float("nan")

    ill(heads["medusa"], place, planted, weights_file="medusa_lm_head.safetensors")
    found = examine_head(str(place), "medusa", deep)
    assert "dtype" in wrong(found) <= {"dtype"} | CONSEQUENCE, found
    assert json.loads((place / "draftsmith.json").read_text())["head"] == "medusa"
