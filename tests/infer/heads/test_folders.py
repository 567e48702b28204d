import json
from pathlib import Path

import pytest
import torch
from head_folders import VOCAB, WIDTH, eagle1, eagle3, folder_of

from draftsmith.infer.heads.folders import (
    TrainedFor,
    kind_of,
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

SAVE = {
    "eagle": lambda folder: save_eagle(folder, eagle3()),
    "medusa": lambda folder: save_medusa(folder, MedusaHeads(WIDTH, VOCAB, 2)),
    "hydra": lambda folder: save_hydra(folder, HydraHeads(WIDTH, VOCAB, 2)),
}
LOAD = {"eagle": load_eagle, "medusa": load_medusa, "hydra": load_hydra}


@pytest.mark.parametrize("kind", SAVE)
def test_a_folder_says_what_head_it_holds(tmp_path, kind):
    SAVE[kind](tmp_path)
    assert kind_of(tmp_path) == kind
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_version_1_is_an_eagle_head_too(tmp_path):
    save_eagle(tmp_path, eagle1())
    assert kind_of(tmp_path) == "eagle"


def test_other_folders_hold_no_head(tmp_path, folders):
    assert kind_of(folders.target) is None
    assert kind_of(tmp_path) is None
    assert kind_of(tmp_path / "nothing") is None
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    assert kind_of(tmp_path) is None


@pytest.mark.parametrize(("kind", "wrong"), [("eagle", "medusa"), ("medusa", "hydra"), ("hydra", "eagle")])
def test_a_head_of_another_kind_is_named_with_the_drafter_that_takes_it(tmp_path, kind, wrong):
    SAVE[kind](tmp_path)
    with pytest.raises(ValueError, match=f"is a folder of {kind} heads, not of {wrong}: use {kind}:"):
        LOAD[wrong](tmp_path)


def test_a_whole_model_is_sent_to_small(folders):
    with pytest.raises(ValueError, match="is no folder of a head, not of eagle: use small:"):
        load_eagle(folders.target)


@pytest.mark.parametrize("kind", SAVE)
def test_a_folder_remembers_whose_states_its_head_reads(tmp_path, kind):
    target = TrainedFor("owner/target", "f" * 8, "t" * 8, 9, "LlamaForCausalLM")
    SAVE[kind](tmp_path / "bare")
    assert trained_for(tmp_path / "bare") is None
    if kind == "eagle":
        save_eagle(tmp_path / "full", eagle3(), target)
    elif kind == "medusa":
        save_medusa(tmp_path / "full", MedusaHeads(WIDTH, VOCAB, 2), target)
    else:
        save_hydra(tmp_path / "full", HydraHeads(WIDTH, VOCAB, 2), target)
    assert trained_for(tmp_path / "full") == target


def test_both_formats_of_an_eagle_head_say_the_same(tmp_path):
    head = eagle3(own_embedding=True, norm_before_residual=True)
    save_eagle(tmp_path / "flat", head)
    save_eagle(tmp_path / "nested", head, TrainedFor("owner/target"), "speculators", 3)
    assert "transformer_layer_config" in json.loads((tmp_path / "nested" / "config.json").read_text())
    flat, nested = load_eagle(tmp_path / "flat"), load_eagle(tmp_path / "nested")
    assert flat.design == nested.design
    assert torch.equal(flat.fc.weight, nested.fc.weight)


def test_an_old_folder_is_replaced_and_a_file_is_not_written_over(tmp_path):
    save_eagle(tmp_path / "head", eagle3())
    save_eagle(tmp_path / "head", eagle3(seed=1))
    assert torch.equal(load_eagle(tmp_path / "head").fc.weight, eagle3(seed=1).fc.weight)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="the head could not be written"):
        save_eagle(tmp_path / "file", eagle3())


# names and damaged files


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("", "is not the name of a head"),
        ("no/such/folder", "does not exist, and is not a Hub name"),
        ("owner/head", "could not be fetched from the Hub"),
    ],
)
def test_names_that_lead_nowhere_are_refused_in_one_line(name, what):
    with pytest.raises(ValueError, match=what) as refused:
        load_eagle(name)
    assert "\n" not in str(refused.value)


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "head.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file: name the folder"):
        load_medusa(tmp_path / "head.pt")


def test_an_empty_folder_holds_no_weights(tmp_path):
    with pytest.raises(ValueError, match=r"holds no weights: no .safetensors, .pt or .bin file"):
        load_medusa(tmp_path)


def test_a_cut_file_is_refused(tmp_path):
    save_eagle(tmp_path, eagle3())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or incomplete"):
        load_eagle(tmp_path)


class Planted:
    """What runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    torch.save({"0.0.linear.weight": Planted(tmp_path / "ran")}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ValueError, match=r"medusa_lm_head.pt is damaged or incomplete"):
        load_medusa(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_of_other_things_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ValueError, match="holds other things than tensors by name"):
        load_medusa(tmp_path)


def test_a_shard_that_is_missing_is_named(tmp_path):
    folder_of(tmp_path, {"fc.weight": torch.zeros(1)}, {}, "model-1-of-2.safetensors")
    index = {"weight_map": {"fc.weight": "model-1-of-2.safetensors", "norm.weight": "model-2-of-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks model-2-of-2.safetensors, which model.safetensors.index.json names"):
        load_eagle(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for weights in ("a.safetensors", "b.safetensors"):
        folder_of(tmp_path, {"fc.weight": torch.zeros(1)}, {}, weights)
    with pytest.raises(ValueError, match=r"holds fc.weight twice: in a.safetensors and in b.safetensors"):
        load_eagle(tmp_path)


def test_a_config_that_is_not_json_is_refused(tmp_path):
    save_eagle(tmp_path, eagle3())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        load_eagle(tmp_path)


def test_an_unknown_dtype_is_refused(tmp_path):
    save_eagle(tmp_path, eagle3())
    with pytest.raises(ValueError, match="unknown dtype 'float8'"):
        load_eagle(tmp_path, dtype="float8")
