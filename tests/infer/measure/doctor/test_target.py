"""A target alone: healthy ones pass, and what would make drafts wrong is found."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from ill_folders import entries, ill, overflowing, verdicts, wrong
from tiny_folders import Folders, save, tiny_llama
from tiny_models import tiny_model

from draftsmith.infer.measure.doctor.finding import Finding
from draftsmith.infer.measure.doctor.questions import built_in
from draftsmith.infer.measure.doctor.target import examine_target
from draftsmith.infer.models.hf_target import HFTarget


def examine(folder: str, dtype: str = "auto") -> list[Finding]:
    return examine_target(folder, built_in()[:4], "auto", 16, dtype, torch.device("cpu"), lambda line: None)


@pytest.mark.parametrize("name", ["target", "bfloat16"])
def test_healthy_targets_pass(folders: Folders, name: str) -> None:
    found = examine(getattr(folders, name))
    assert {one.check: one.found for one in found if one.verdict != "ok"} == {}
    greedy = next(one.found for one in found if one.check == "greedy")
    assert "up to 0 at once" not in greedy, "nothing was drafted, so no tree was tried"


def test_a_target_with_recurrent_layers_takes_chains(folders: Folders, tmp_path: Path) -> None:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=0, layer_types=["linear_attention", "full_attention"], eos_token_id=1,
        pad_token_id=0, initializer_range=0.15,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3NextForCausalLM(config).eval()
    found = examine(save(tmp_path / "recurrent", model, folders.tokenizer))
    assert wrong(found) == set(), found
    assert "takes chains and no trees" in next(one.found for one in found if one.check == "tree")


def test_a_target_that_cannot_verify_is_a_finding(folders: Folders, tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4, eos_token_id=1))
    found = examine(save(tmp_path / "alibi", model, folders.tokenizer))
    assert wrong(found) == {"tree"}
    assert "ALiBi" in next(one.found for one in found if one.check == "tree")
    assert verdicts(found)["greedy"] == "cannot tell"


def test_an_engine_that_leaves_generates_text_is_found(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    score = HFTarget.score

    def planted(self: HFTarget, rows: Any, drafts: Any) -> Any:
        scores = score(self, rows, drafts)
        if len(rows[0].new_ids) > 5:
            scores.logits_NV = scores.logits_NV.roll(1, -1)
            scores.choices_N = None
        return scores

    monkeypatch.setattr(HFTarget, "score", planted)
    found = examine(folders.target)
    assert wrong(found) == {"greedy"}
    assert "leaves generate's at token" in next(one.found for one in found if one.check == "greedy")


def test_half_precision_that_overflows(folders: Folders, tmp_path: Path) -> None:
    place = ill(folders.target, tmp_path / "ill", overflowing)
    found = examine(place, "float16")
    assert wrong(found) == {"dtype"}, found
    assert wrong(examine(place)) == set()


def test_nothing_ends_an_answer_and_a_template_that_drops_turns(folders: Folders, tmp_path: Path) -> None:
    other = copy.deepcopy(folders.tokenizer)
    other.chat_template = "{{ messages[-1]['content'] }}"
    place = save(tmp_path / "target", tiny_llama(), other)
    found = examine(ill(place, tmp_path / "ill", None, {"generation_config.json": entries(eos_token_id=[7])}))
    assert wrong(found) == {"special tokens", "template"}
    assert "answers end with [7], and the tokenizer's eos is 1" in str(found)


def test_a_folder_without_a_tokenizer_and_damaged_weights_are_findings(folders: Folders, tmp_path: Path) -> None:
    assert wrong(examine(save(tmp_path / "bare", tiny_llama(), None))) == {"tokenizer"}
    place = Path(ill(folders.target, tmp_path / "torn"))
    (place / "model.safetensors").write_bytes((place / "model.safetensors").read_bytes()[:2000])
    assert wrong(examine(str(place))) == {"files"}


def test_prompts_that_do_not_fit_leave_the_other_checks(folders: Folders, tmp_path: Path) -> None:
    found = verdicts(examine(save(tmp_path / "short", tiny_llama(max_position_embeddings=24), folders.tokenizer)))
    assert (found["greedy"], found["tree"], found["dtype"]) == ("cannot tell", "ok", "ok")


def test_other_families_pass_too(folders: Folders, tmp_path: Path) -> None:
    model = tiny_model("gemma2", torch.float32, vocab_size=300, eos_token_id=1)
    found = examine(save(tmp_path / "gemma2", model, folders.tokenizer))
    assert wrong(found) == set(), found
