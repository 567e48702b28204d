"""What is wrong with the input is told in one clear line, with exit code 2 and no traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_folders import save, tiny_llama

SMALL = {"vocab_size": 300, "pad_token_id": 0, "eos_token_id": 1}


def refused(told, *expected: str) -> str:
    """The one line. Progress that is drawn over itself is not counted."""
    assert told.code == 2, (told.code, told.out, told.err)
    assert "Traceback" not in told.err
    lines = [line for line in told.err.splitlines() if line.startswith("draftsmith ")]
    assert len(lines) == 1, told.err
    assert told.err.splitlines()[-1] == lines[0]
    for words in expected:
        assert words in lines[0], lines[0]
    assert told.out == ""
    return lines[0]


@pytest.fixture
def generate(call, folders):
    def generate(*words, target=folders.target, prompt="hello"):
        return call("generate", "--target", target, "--prompt", prompt, "--max_new_tokens", 8, *words)

    return generate


@pytest.mark.parametrize("prompt", ["", "   ", "\n"])
def test_an_empty_prompt(generate, prompt):
    refused(generate(prompt=prompt), "the prompt is empty")


def test_neither_prompt_nor_data_and_both(call, generate, folders):
    refused(call("generate", "--target", folders.target), "--prompt", "--data")
    refused(generate("--data", "x.jsonl"), "--prompt", "--data")


def test_a_prompt_longer_than_the_context(generate):
    refused(generate(prompt="too long " * 300), "tokens, but the target's context ends at 512")


@pytest.mark.parametrize("drafter", ["", "pld"])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_weights_that_are_not_numbers(generate, folders, tmp_path, drafter, temperature):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] = float("nan")
    target = save(tmp_path / "nan", model, folders.tokenizer)
    refused(generate("--drafters", drafter, "--temperature", temperature, target=target), "logits are NaN")


def test_a_folder_without_a_tokenizer(generate, tmp_path):
    refused(generate(target=save(tmp_path / "bare", tiny_llama(), None)), "bare holds no tokenizer")


def test_a_folder_without_a_model(generate, folders, tmp_path):
    folders.tokenizer.save_pretrained(tmp_path / "words")
    refused(generate(target=tmp_path / "words"), "is not a model folder")


@pytest.mark.parametrize("name", ["/no/such/model", "./nowhere", "nowhere", "a/b/c"])
@pytest.mark.parametrize("flag", ["--target", "--drafters"])
def test_a_path_that_does_not_exist_is_not_looked_for_elsewhere(generate, monkeypatch, flag, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("reached for the network"))
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: pytest.fail("reached for the network"))
    began = time.monotonic()
    told = generate(flag, name) if flag == "--target" else generate(flag, f"small:{name}")
    assert time.monotonic() - began < 20
    refused(told, name)


def test_an_unknown_drafter(generate):
    refused(generate("--drafters", "pdl"), "unknown drafter 'pdl'", "known are pld")
    refused(generate("--drafters", "pld,empty"), "one drafter")


def test_a_draft_of_another_tokenizer_is_refused_though_the_sizes_are_equal(generate, folders):
    refused(generate("--drafters", f"small:{folders.stranger}"), "another tokenizer than the target")
    assert generate("--drafters", f"small:{folders.draft}").code == 0


OUT_OF_RANGE = """
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.contract.draft import Draft


class Wild(Empty):
    name = "wild"
    drafts_unread = True

    def __init__(self, token: int):
        self.token = token

    def propose(self, rows, budgets, policy=None):
        return [Draft().chain([5, self.token], self.name) if budget.depth > 1 else Draft() for budget in budgets]
"""


@pytest.mark.parametrize("token", [300, 100_000, -1])
def test_a_drafter_that_proposes_an_id_out_of_range(generate, monkeypatch, tmp_path, token):
    (tmp_path / "wild_drafter.py").write_text(OUT_OF_RANGE)
    (tmp_path / "wild.yaml").write_text(f"class_path: wild_drafter.Wild\ninit_args: {{token: {token}}}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wild_drafter", raising=False)
    refused(generate("--drafters", tmp_path / "wild.yaml"), f"token id {token}", "vocabulary of 300")


@pytest.mark.parametrize("command", ["generate", "bench", "answers", "replay"])
def test_malformed_jsonl_names_its_row(call, folders, tmp_path, command):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "a", "output": "b"}) + "\n" + '{"prompt": "c"\n')
    words = {
        "generate": ["--target", folders.target],
        "bench": ["--target", folders.target],
        "answers": ["--target", folders.target, "--out", tmp_path / "out.jsonl"],
        "replay": ["--tokenizer", folders.target, "--drafters", "pld"],
    }[command]
    told = call(command, "--data", data, *words)
    line = refused(told, "rows.jsonl")
    assert "row 2" in line
    assert not (tmp_path / "out.jsonl").exists()


def test_data_that_is_not_there(call, folders, tmp_path):
    refused(call("generate", "--target", folders.target, "--data", tmp_path / "none.jsonl"), "none.jsonl", "no such")


def test_a_run_folder_that_exists(call, folders, tmp_path, rows_file):
    out = tmp_path / "run"
    out.mkdir()
    (out / "kept").write_text("mine")
    words = ["bench", "--target", folders.target, "--data", rows_file([{"prompt": "a"}]), "--out"]
    refused(call(*words, out), "is not empty")
    refused(call(*words, out / "kept"), "is a file")
    assert [path.name for path in out.iterdir()] == ["kept"]


def _t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(**SMALL, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


def _bloom():
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(**SMALL, hidden_size=16, n_layer=1, n_head=2))


def _mamba():
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(**SMALL, hidden_size=16, num_hidden_layers=1, state_size=4))


@pytest.mark.parametrize(("make", "reason"), [(_t5, "encoder-decoder"), (_bloom, "ALiBi")], ids=["t5", "bloom"])
def test_what_takes_no_tree_mask_is_refused_as_target_and_as_draft(generate, folders, tmp_path, make, reason):
    folder = save(tmp_path / "odd", make(), folders.tokenizer)
    refused(generate(target=folder), reason)
    refused(generate("--drafters", f"small:{folder}"), reason)


def test_what_cannot_branch_is_refused_as_draft(generate, folders, tmp_path):
    folder = save(tmp_path / "odd", _mamba(), folders.tokenizer)
    refused(generate("--drafters", f"small:{folder}"), "state cannot branch into a tree")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--temperature", -1], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--top_p", 0], "top_p"),
        (["--top_p", 1.5], "top_p"),
        (["--top_k", -3], "top_k"),
        (["--min_p", 2], "min_p"),
        (["--repetition_penalty", 0], "repetition_penalty"),
        (["--max_new_tokens", 0], "max_new_tokens"),
        (["--batch_size", 0], "batch_size"),
        (["--dtype", "float8"], "dtype"),
        (["--template", "chatt"], "chatt"),
        (["--stop", ""], "stop string"),
        (["--temperture", 1], "did you mean --temperature"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_settings_out_of_range(generate, words, expected):
    refused(generate(*words), expected)


@pytest.mark.parametrize("peers", ["nobody", "assistant", "generate:x"])
def test_an_unknown_peer(call, folders, rows_file, peers):
    refused(call("bench", "--target", folders.target, "--data", rows_file([{"prompt": "a"}]), "--peers", peers), "peer")


def test_a_generation_config_that_no_drafting_can_honour(generate, folders, tmp_path):
    folder = tmp_path / "beams"
    shutil.copytree(folders.target, folder)
    (folder / "generation_config.json").write_text(json.dumps({"num_beams": 4}))
    refused(generate(target=folder), "num_beams=4")


def test_the_console_script_says_it_in_one_line_and_with_exit_code_2():
    script = Path(sys.executable).with_name("draftsmith")
    command = [str(script), "generate", "--target", "/no/such/model", "--prompt", "x"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.count("\n") == 1
    assert "/no/such/model" in ran.stderr
