"""A head is exported to what an engine reads, and refused where the engine would draft something else in silence."""

import json

import pytest
import torch
from head_folders import FEATURES, LAYERS, VOCAB, WIDTH, eagle1, eagle3, said, target_config
from safetensors.torch import load_file
from transformers import Qwen3Config

from draftsmith.infer.heads.folders import (
    TrainedFor,
    load_eagle,
    load_hydra,
    load_medusa,
    save_eagle,
    save_hydra,
    save_medusa,
    trained_for,
)
from draftsmith.infer.heads.hydra import HydraHeads
from draftsmith.infer.heads.medusa import MedusaHeads
from draftsmith.infer.text.tokenizer import load_tokenizer, tokenizer_fingerprint
from draftsmith.train.export.head import export_head, refusals

OTHER = ("layer:1", "layer:4", "layer:8")


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "target"
    target_config(architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Target\n")
    (folder / "LICENSE.txt").write_text("as is")
    return str(folder)


def exported(tmp_path, target, head, engine=None, **options):
    """The facts of an export, the folder and its config."""
    save_eagle(tmp_path / "head", head, TrainedFor(target, num_layers=LAYERS))
    facts = export_head(str(tmp_path / "head"), tmp_path / "out", "eagle", target=target, engine=engine, **options)
    return facts, tmp_path / "out", json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("engine", [None, "vllm", "sglang", "speculators"])
def test_an_exported_head_says_what_it_said(tmp_path, target, engine):
    head = eagle3()
    facts, out, config = exported(tmp_path, target, head, engine)
    assert torch.equal(said(load_eagle(out)), said(head))
    assert ("transformer_layer_config" in config) == (engine == "speculators")
    assert facts["files"] == sorted(path.name for path in out.iterdir())
    assert "LICENSE.txt" in facts["files"]


def test_for_vllm_and_sglang_a_plain_head_is_one_folder(tmp_path, target):
    first = exported(tmp_path / "a", target, eagle3(), "vllm")
    second = exported(tmp_path / "b", target, eagle3(), "sglang")
    assert first[2] == second[2]
    assert "eagle_aux_hidden_state_layer_ids" not in first[2]
    assert first[0]["serve"].endswith('\'{"method": "eagle3", "model": "out", "num_speculative_tokens": 5}\'')
    assert json.loads((first[1] / "speculative_config.json").read_text())["method"] == "eagle3"
    assert "--speculative-algorithm EAGLE3 --speculative-draft-model-path out" in second[0]["serve"]


def test_other_layers_are_counted_as_each_engine_counts_them(tmp_path, target):
    config = exported(tmp_path / "a", target, eagle3(features=OTHER), "vllm")[2]
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 4, 8]
    config = exported(tmp_path / "b", target, eagle3(features=OTHER), "sglang")[2]
    assert "eagle_aux_hidden_state_layer_ids" not in config
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 3, 7]


@pytest.mark.parametrize(
    ("head", "engine", "why"),
    [
        (eagle3(norm_before_residual=True), "sglang", "norm_before_residual is not read there"),
        (
            eagle3(norm_before_fc=True, norm_before_residual=True),
            "sglang",
            "norm_before_residual and norm_before_fc is",
        ),
        (eagle3(layers=2), "sglang", "it has 2 layers"),
        (eagle3(features=("layer:0", "layer:4", "layer:6")), "sglang", r"reads the embeddings \(layer:0\)"),
        (eagle3(fc_bias=True), "vllm", "its fc has a bias, and vLLM's has none"),
        (eagle3(kind=Qwen3Config), "vllm", "its layers are qwen3's, and Llama's are built there"),
        (eagle1(bias=True), "vllm", "its fc has a bias, and vLLM's has none"),
    ],
)
def test_what_an_engine_would_not_read_is_refused_in_one_line(tmp_path, target, head, engine, why):
    with pytest.raises(ValueError, match=f"{engine} cannot run this head: .*{why}"):
        exported(tmp_path, target, head, engine)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head", "target"]


def test_switches_that_both_engines_read_are_no_reason():
    assert refusals(eagle3(norm_output=True, fc_norm=True), "sglang") == []
    assert refusals(eagle3(norm_output=True, norm_before_fc=True, norm_before_residual=True, layers=2), "vllm") == []


def test_sglang_gets_the_bias_that_its_version_1_always_has(tmp_path, target):
    head = eagle1(bias=False)
    _, out, config = exported(tmp_path, target, head, "sglang")
    assert config["architectures"] == ["LlamaForCausalLMEagle"]
    assert float(load_file(out / "model.safetensors")["fc.bias"].abs().max()) == 0
    assert torch.equal(said(load_eagle(out)), said(head))


def test_transformers_takes_no_heads(tmp_path, target):
    with pytest.raises(ValueError, match="transformers takes whole models as assistants, and no heads"):
        exported(tmp_path, target, eagle3(), "transformers")


def test_the_card_says_what_the_head_is_and_what_was_measured(tmp_path, target):
    run = {"settings": {"target": target, "watch": {"num_draft_tokens": 5}}, "results": {"accepted_length": 2.345}}
    save_eagle(tmp_path / "head", eagle3(norm_output=True), TrainedFor(target, num_layers=LAYERS))
    (tmp_path / "head" / "run.json").write_text(json.dumps(run))
    export_head(str(tmp_path / "head"), tmp_path / "out", "eagle", engine="vllm", name="me/head")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "reads layer:2, layer:4, layer:6 of the target's states, drafts 20 of 61 tokens, with norm_output." in card
    assert "accepted_length 2.35 (held-out prompts)" in card or "accepted_length 2.34 (held-out prompts)" in card
    assert "--drafters eagle:me/head" in card
    assert "license: mit" in card
    assert str(tmp_path) not in card


def test_an_exported_head_keeps_what_it_was_trained_for(tmp_path, target):
    save_eagle(tmp_path / "head", eagle3(), TrainedFor(target, "weights", "tokens", LAYERS))
    export_head(str(tmp_path / "head"), tmp_path / "out", "eagle")
    assert trained_for(tmp_path / "out") == TrainedFor("target", "weights", "tokens", LAYERS, "LlamaForCausalLM")


def test_weights_may_change_their_dtype(tmp_path, target):
    _, out, config = exported(tmp_path, target, eagle3(), "vllm", dtype="bfloat16")
    assert config["dtype"] == "bfloat16"
    assert load_eagle(out).fc.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_other_heads_are_copied_and_no_engine_takes_them(tmp_path, target, kind):
    made = MedusaHeads(WIDTH, VOCAB, 2) if kind == "medusa" else HydraHeads(WIDTH, VOCAB, 2)
    (save_medusa if kind == "medusa" else save_hydra)(tmp_path / "head", made)
    facts = export_head(str(tmp_path / "head"), tmp_path / "out", kind, target=target)
    back = (load_medusa if kind == "medusa" else load_hydra)(tmp_path / "out")
    assert torch.equal(back.heads[1].lm_head.weight, made.heads[1].lm_head.weight)
    assert "2 heads of 1 block each" in (tmp_path / "out" / "README.md").read_text()
    assert facts["compared"] is False
    for engine in ("vllm", "sglang"):
        with pytest.raises(ValueError, match="leave --engine out"):
            export_head(str(tmp_path / "head"), tmp_path / "other", kind, target=target, engine=engine)


def test_a_head_of_another_target_or_tokenizer_is_refused(tmp_path, target, folders):
    save_eagle(tmp_path / "wide", eagle3(feature_width=48))
    with pytest.raises(ValueError, match="reads states of width 48, and the target's are 32 wide"):
        export_head(str(tmp_path / "wide"), tmp_path / "out", "eagle", target=target)
    own = tokenizer_fingerprint(load_tokenizer(folders.target))
    for fingerprint, refused in ((own, False), ("another", True)):
        save_medusa(tmp_path / fingerprint, MedusaHeads(WIDTH, VOCAB, 2), TrainedFor("t", "", fingerprint))
        if refused:
            with pytest.raises(ValueError, match="it was trained with another tokenizer"):
                export_head(str(tmp_path / fingerprint), tmp_path / "out", "medusa", target=str(folders.target))


def test_a_head_that_does_not_name_its_target_needs_one(tmp_path):
    save_eagle(tmp_path / "head", eagle3())
    with pytest.raises(ValueError, match="does not say what target it drafts for: give --target"):
        export_head(str(tmp_path / "head"), tmp_path / "out", "eagle")
    with pytest.raises(ValueError, match="no/such/target does not exist"):
        export_head(str(tmp_path / "head"), tmp_path / "out", "eagle", target="no/such/target")
    assert FEATURES[0] == "layer:2"
