"""Each planted fault of a draft model is found by its own check, and the other checks stay ok."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ill_folders import (
    entries,
    ill,
    overflowing,
    permuted_rotary,
    random_embedding,
    shifted_ids,
    shifted_tokenizer,
    sit,
    theta,
    verdicts,
    wrong,
)
from safetensors.torch import load_file, save_file
from tiny_folders import Folders, padded, save, tiny_llama

from draftsmith.infer.measure.doctor.draft import examine_draft
from draftsmith.infer.measure.doctor.exam import Exam
from draftsmith.infer.text.templates import find_template

# It shows what any fault does, and is no healthy check beside one.
CONSEQUENCE = {"accepted_length"}
OTHER_TEMPLATE = "{% for m in messages %}USER: {{ m.content }}\n{% endfor %}ASSISTANT:"
# Of a copy of the target: what is changed, and the checks that say so.
FAULTS: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
    "random embedding": (random_embedding, {}, {"embedding"}),
    "permuted rotary weights": (permuted_rotary, {}, {"rotary"}),
    "rows of ids shifted by one": (shifted_ids, {}, {"embedding", "head"}),
    "another rope_theta": (None, {"config.json": theta(500_000.0)}, {"rotary"}),
}


def others_ok(found: dict[str, str], expected: set[str]) -> bool:
    return {check for check, verdict in found.items() if verdict != "ok"} - CONSEQUENCE == expected


@pytest.mark.parametrize("name", ["draft", "same_size_draft", "target", "bfloat16"])
def test_healthy_drafts_pass(exam: Exam, folders: Folders, name: str) -> None:
    found = examine_draft(getattr(folders, name), exam)
    assert {one.check: one.found for one in found if one.verdict != "ok"} == {}
    length = next(one.found for one in found if one.check == "accepted_length")
    assert float(length.split()[0]) > 1.5, "a healthy draft that nothing accepts shows nothing"


def test_a_healthy_sorted_draft_passes(exam: Exam, sorted_draft: str) -> None:
    found = examine_draft(sorted_draft, exam)
    assert {one.check: one.found for one in found if one.verdict != "ok"} == {}
    assert "exits" in verdicts(found)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_by_its_own_check_without_a_reference(
    exam: Exam, folders: Folders, tmp_path: Path, fault: str
) -> None:
    weights, files, expected = FAULTS[fault]
    found = examine_draft(ill(folders.target, tmp_path / "ill", weights, files), exam)
    assert others_ok(verdicts(found), expected), found
    assert wrong(found) - CONSEQUENCE == expected
    assert all(one.mend for one in found if one.verdict == "wrong")


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, marks=[] if "rotary" in fault else pytest.mark.slow) for fault in FAULTS],
)
def test_a_planted_fault_is_found_by_its_own_check_with_a_reference(
    exam: Exam, folders: Folders, tmp_path: Path, fault: str
) -> None:
    weights, files, expected = FAULTS[fault]
    found = examine_draft(ill(folders.draft, tmp_path / "ill", weights, files), exam, folders.draft)
    assert others_ok(verdicts(found), expected), found
    assert wrong(found) == expected | CONSEQUENCE, "the reference's accepted_length is higher"


def test_a_draft_equals_its_own_reference(exam: Exam, folders: Folders) -> None:
    found = examine_draft(folders.draft, exam, folders.draft)
    assert set(verdicts(found).values()) == {"ok"}
    assert "weights" in verdicts(found)


def test_one_weight_that_is_not_the_references_is_named(exam: Exam, folders: Folders, tmp_path: Path) -> None:
    def changed(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1.5

    found = examine_draft(ill(folders.draft, tmp_path / "ill", changed), exam, folders.draft)
    (one,) = [one for one in found if one.check == "weights"]
    assert (one.verdict, "model.layers.1.mlp.up_proj.weight (by 50%)" in one.found) == ("wrong", True)
    assert others_ok(verdicts(found), {"weights"})


def test_ids_of_a_tokenizer_that_are_shifted_by_one(exam: Exam, folders: Folders, tmp_path: Path) -> None:
    padded_draft = save(tmp_path / "padded", padded(tiny_llama(), 320), folders.tokenizer)
    found = examine_draft(ill(padded_draft, tmp_path / "ill", files={"tokenizer.json": shifted_tokenizer}), exam)
    assert wrong(found) == {"tokenizer"}
    assert "every id is the target's +1" in next(one.found for one in found if one.check == "tokenizer")
    assert {verdicts(found)[name] for name in ("embedding", "head", "rotary", "special tokens")} == {"ok"}
    assert verdicts(found)["accepted_length"] == "cannot tell", "nothing can be drafted with other ids"


def test_another_targets_draft_is_found_by_its_tokenizer(exam: Exam, folders: Folders) -> None:
    found = examine_draft(folders.stranger, exam)
    assert wrong(found) == {"tokenizer"}
    assert "texts get other ids than the target's" in next(one.found for one in found if one.check == "tokenizer")


def test_another_chat_template(exam: Exam, folders: Folders, tmp_path: Path) -> None:
    place = ill(folders.draft, tmp_path / "ill")
    (Path(place) / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    found = examine_draft(place, exam)
    assert others_ok(verdicts(found), {"template"}), found
    assert wrong(found) == {"template"}


def test_a_template_that_a_draft_was_trained_with_is_named(exam: Exam, folders: Folders, tmp_path: Path) -> None:
    plain = find_template("plain", folders.tokenizer).fingerprint()
    trained = ill(folders.draft, tmp_path / "ill", files={"config.json": entries(template_fingerprint=plain)})
    found = examine_draft(trained, exam)
    assert wrong(found) == {"template"}
    (one,) = [one for one in found if one.check == "template"]
    assert "trained with plain" in one.found
    assert "--template plain" in one.mend
    chat = entries(template_fingerprint=exam.template.fingerprint())
    assert wrong(examine_draft(ill(folders.draft, tmp_path / "well", files={"config.json": chat}), exam)) == set()


@pytest.mark.parametrize(
    ("exits", "said"),
    [
        ([1, 4], "exit 1 hardly predicts"),
        ([2, 3], "2, 3 must rise and end with its 4 layers"),
        ([4, 2], "4, 2 must rise and end with its 4 layers"),
    ],
)
def test_wrong_exits(exam: Exam, sorted_draft: str, tmp_path: Path, exits: list[int], said: str) -> None:
    found = examine_draft(ill(sorted_draft, tmp_path / "ill", files={"config.json": entries(sorted_exits=exits)}), exam)
    assert wrong(found) == {"exits"}
    assert said in next(one.found for one in found if one.check == "exits")


def test_exits_that_predict_well_and_are_not_the_references(exam: Exam, sorted_draft: str, tmp_path: Path) -> None:
    other = ill(sorted_draft, tmp_path / "ill", files={"config.json": entries(sorted_exits=[3, 4])})
    assert wrong(examine_draft(other, exam)) == set()
    assert wrong(examine_draft(other, exam, sorted_draft)) == {"exits"}


def test_half_precision_that_overflows(folders: Folders, tmp_path: Path) -> None:
    half = sit(folders.target, 3, 12, "float16")
    assert wrong(examine_draft(folders.target, half)) == set()
    found = examine_draft(ill(folders.target, tmp_path / "ill", overflowing), half)
    assert others_ok(verdicts(found), {"dtype"}), found
    assert "its logits are NaN or infinite in the target's float16" in str(found)


def test_the_same_weights_are_well_in_float32(exam: Exam, folders: Folders, tmp_path: Path) -> None:
    assert wrong(examine_draft(ill(folders.target, tmp_path / "ill", overflowing), exam)) == set()


def test_weights_that_are_infinite_as_stored(exam: Exam, folders: Folders, tmp_path: Path) -> None:
    def planted(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("inf")

    found = examine_draft(ill(folders.target, tmp_path / "ill", planted), exam)
    assert wrong(found) - CONSEQUENCE == {"dtype"}
    assert "mlp.up_proj.weight holds NaN or infinity" in str(found)
    assert verdicts(found)["rotary"] == "cannot tell", "what cannot be run cannot be tried"


def test_a_weight_that_the_files_lack_is_named(exam: Exam, folders: Folders, tmp_path: Path) -> None:
    def planted(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.embed_tokens.weight"]

    found = examine_draft(ill(folders.target, tmp_path / "ill", planted), exam)
    assert {"files", "embedding"} <= wrong(found) <= {"files", "embedding"} | CONSEQUENCE
    assert "no model.embed_tokens.weight" in next(one.found for one in found if one.check == "files")


def test_damaged_weights_are_a_finding_and_the_tokenizer_is_checked_all_the_same(
    exam: Exam, folders: Folders, tmp_path: Path
) -> None:
    place = Path(ill(folders.draft, tmp_path / "ill"))
    whole = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(whole[:2000])
    found = examine_draft(str(place), exam)
    assert verdicts(found) == {"files": "wrong", "tokenizer": "ok", "accepted_length": "cannot tell"}
    assert "damaged or incomplete" in found[0].found


def test_a_vocabulary_without_rows_for_all_tokens_and_padding_that_wins(
    exam: Exam, folders: Folders, tmp_path: Path
) -> None:
    short = save(tmp_path / "short", tiny_llama(vocab=290), folders.tokenizer)
    assert verdicts(examine_draft(short, exam))["vocabulary"] == "wrong"
    place = Path(save(tmp_path / "padded", padded(tiny_llama(), 310), folders.tokenizer))
    tensors = load_file(place / "model.safetensors")
    tensors["lm_head.weight"][305] = 3 * tensors["lm_head.weight"][68]
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    found = examine_draft(str(place), exam)
    assert wrong(found) - CONSEQUENCE == {"vocabulary"}
    assert "beyond the 300 tokens is the likeliest" in str(found)
