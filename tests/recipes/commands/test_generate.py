"""`draftsmith generate`: one text, however it is asked for."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from tiny_folders import EOS_IDS

PROMPTS = ["what does the fox say?", "the dog, the dog, the dog"]
NEW = 48


@pytest.fixture
def generate(call, folders):
    """The JSON of one prompt."""

    def generate(*words, prompt=PROMPTS[0], target=folders.target, new=NEW):
        told = call("generate", "--target", target, "--prompt", prompt, "--max_new_tokens", new, *words, "--json")
        return told.json

    return generate


def with_generation_config(folders, tmp_path: Path, **fields) -> str:
    """A copy of the target whose generation_config.json says something."""
    folder = tmp_path / "configured"
    shutil.copytree(folders.target, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": EOS_IDS, "pad_token_id": 0} | fields))
    return str(folder)


@pytest.mark.parametrize("drafter", ["", "pld", "small"])
def test_streamed_batched_and_json_are_one_text(call, folders, generate, rows_file, drafter):
    spec = f"small:{folders.draft}" if drafter == "small" else drafter
    common = ["--target", folders.target, "--max_new_tokens", NEW, "--drafters", spec]
    questions = rows_file([{"id": str(i), "prompt": prompt} for i, prompt in enumerate(PROMPTS)])
    plain = [generate(prompt=prompt) for prompt in PROMPTS]
    told = call("generate", *common, "--data", questions, "--batch_size", 2, "--json")
    together = told.json["generations"]
    printed = call("generate", *common, "--data", questions, "--batch_size", 2).out
    for i, prompt in enumerate(PROMPTS):
        found = generate("--drafters", spec, prompt=prompt)
        assert found["token_ids"] == plain[i]["token_ids"] == together[i]["token_ids"]
        assert len(found["token_ids"]) == NEW
        assert found["text"] == folders.tokenizer.decode(found["token_ids"], skip_special_tokens=True)
        assert found["text"] == together[i]["text"]
        streamed = call("generate", *common, "--prompt", prompt).out
        assert streamed == found["text"] + "\n"
        assert f"== {i}\n{found['text']}\n" in printed
    if drafter:
        assert found["metrics"]["accepted_length"] > 1.2


def test_the_answer_is_what_transformers_gives(folders, generate):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folders.target)
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": PROMPTS[0]}]
    ids = folders.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    theirs = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :].tolist()
    assert generate("--system", "be brief")["token_ids"] == theirs


def test_a_record_s_own_system_message_is_part_of_its_prompt(call, folders, generate, rows_file):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": PROMPTS[0]}]
    rows = rows_file([{"messages": messages}])
    found = call("generate", "--target", folders.target, "--data", rows, "--max_new_tokens", NEW, "--json").json
    assert found["generations"][0]["token_ids"] == generate("--system", "be brief")["token_ids"]


@pytest.mark.parametrize("new", [1, 2, 7])
def test_max_new_tokens_is_exact_inside_an_accepted_path(folders, generate, new):
    spec = f"small:{folders.target}[num_draft_tokens=8,top_k=1,min_confidence=0]"
    whole = generate()["token_ids"]
    found = generate("--drafters", spec, new=new)
    assert found["token_ids"] == whole[:new]
    assert found["stop"] == "max_new_tokens"


def test_every_stop_id_ends_the_answer_inside_an_accepted_path(folders, generate):
    spec = f"small:{folders.target}[num_draft_tokens=8,top_k=1,min_confidence=0]"
    whole = generate()["token_ids"]
    late = [at for at in range(10, NEW) if whole[at] not in whole[:at] and (at + 1) % 9]
    assert len(late) >= 2
    for at in late[:3]:
        unmet = next(token for token in range(10, 300) if token not in whole)
        found = generate("--drafters", spec, "--stop_ids", unmet, whole[at])
        assert found["token_ids"] == whole[: at + 1]
        assert found["stop"] == "eos"
        assert found["metrics"]["steps"] < len(found["token_ids"]) / 3


def test_both_eos_ids_of_the_generation_config_end_an_answer(folders, generate, tmp_path):
    whole = generate()["token_ids"]
    first, second = whole[20], next(token for token in whole[5:15] if token != whole[20])
    for order in ([first, second], [second, first]):
        target = with_generation_config(folders, tmp_path / str(order[0]), eos_token_id=order)
        found = generate("--drafters", "pld", target=target)
        end = min(whole.index(first), whole.index(second))
        assert found["token_ids"] == whole[: end + 1]


def test_a_stop_string_cuts_tokens_and_text_inside_an_accepted_path(folders, generate):
    tokenizer, whole = folders.tokenizer, generate()["token_ids"]
    spec = f"small:{folders.target}[num_draft_tokens=8,top_k=1,min_confidence=0]"
    tried = 0
    for at in range(6, NEW - 3):
        stop = tokenizer.decode(whole[at : at + 2])
        end = next(n for n in range(NEW + 1) if stop in tokenizer.decode(whole[:n]))
        if "�" in stop or not stop.strip() or end < 6 or end % 9 in (0, 1):
            continue
        found = generate("--drafters", spec, "--stop", "never said", stop)
        assert found["token_ids"] == whole[:end]
        assert stop in found["text"]
        assert stop not in tokenizer.decode(found["token_ids"][:-1])
        assert found["stop"] == f"stop string {stop!r}"
        assert found["metrics"]["steps"] < end / 2
        tried += 1
        if tried == 3:
            return
    raise AssertionError("this answer holds no text to stop at")


def test_one_seed_is_one_text_with_and_without_an_outright_drafter(folders, generate):
    sampled = ["--temperature", 0.8, "--top_k", 30, "--top_p", 0.95]
    first = generate(*sampled, "--seed", 5)["token_ids"]
    for spec in ("", "pld", f"small:{folders.draft}[top_k=3,sample=false]"):
        assert generate(*sampled, "--seed", 5, "--drafters", spec)["token_ids"] == first
    assert generate(*sampled, "--seed", 6)["token_ids"] != first
    assert generate()["token_ids"] != first


def test_a_bare_generation_config_adds_no_top_k(generate):
    """At a high temperature most of the distribution lies outside the 50 likeliest tokens, and so must the draws."""
    hot = ["--temperature", 5.0, "--seed", 3]
    bare = generate(*hot)["token_ids"]
    assert generate(*hot, "--top_k", 0)["token_ids"] == bare
    assert generate(*hot, "--top_k", 50)["token_ids"] != bare


FIELDS = {"temperature": 0.7, "top_k": 5, "top_p": 0.6, "min_p": 0.2, "repetition_penalty": 1.5}


def test_the_generation_config_says_how_to_sample_and_flags_override_it(folders, generate, tmp_path):
    target = with_generation_config(folders, tmp_path, do_sample=True, **FIELDS)
    flags = [word for name, value in FIELDS.items() for word in (f"--{name}", value)]
    wanted = generate(*flags)["token_ids"]
    assert generate(target=target)["token_ids"] == wanted
    off = ["--temperature", 0, "--repetition_penalty", 1.0]
    assert generate(*off, target=target)["token_ids"] == generate()["token_ids"]


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_counts_as_a_flag_and_in_the_generation_config(folders, generate, tmp_path, name):
    """Each one alone, in a hot distribution where it changes the text: none is dropped on either way."""
    hot = generate("--temperature", 1.5, "--seed", 1)["token_ids"]
    by_flag = generate("--temperature", 1.5, "--seed", 1, f"--{name}", FIELDS[name])["token_ids"]
    target = with_generation_config(
        folders, tmp_path, **({"do_sample": True, "temperature": 1.5} | {name: FIELDS[name]})
    )
    assert generate("--seed", 1, target=target)["token_ids"] == by_flag
    assert by_flag != hot


def test_the_prompt_may_come_from_standard_input(generate, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPTS[1]))
    assert generate(prompt="-")["token_ids"] == generate(prompt=PROMPTS[1])["token_ids"]


@pytest.mark.parametrize("prompt", ["123", "null", "[1, 2]", "a: b", "{'x': 1}", "true", "--no flag", "# hash", "é\n"])
def test_a_prompt_is_text_whatever_it_looks_like(generate, monkeypatch, prompt):
    monkeypatch.setattr("sys.stdin", io.StringIO(prompt))
    wanted = generate(prompt="-", new=4)
    assert generate(f"--prompt={prompt}", new=4)["token_ids"] == wanted["token_ids"]


def test_a_system_message_and_stop_strings_are_text_whatever_they_look_like(generate, folders):
    plain = generate()["token_ids"]
    assert len({tuple(generate("--system", text)["token_ids"]) for text in ("null", "# rules", "1")}) == 3
    assert generate("--stop", "null", "[", "# x")["token_ids"][:2] == plain[:2]


STATS = ["tokens", "tokens_per_s", "accepted_length", "acceptance_rate", "prefill_s", "decode_s"]


def test_stats_follow_the_text_on_standard_error_and_stand_in_the_json(call, folders):
    common = ["generate", "--target", folders.target, "--prompt", PROMPTS[1], "--max_new_tokens", NEW]
    told = call(*common, "--drafters", "pld", "--stats")
    plain = call(*common)
    assert (told.code, told.out, plain.err) == (0, plain.out, "")
    first, second = told.err.splitlines()
    assert re.fullmatch(rf"{NEW} tokens, [\d.]+ tokens/s, prefill [\d.]+ s, decode [\d.]+ s", first)
    assert re.fullmatch(r"drafter pld: accepted_length [\d.]+, acceptance_rate [\d.]+", second)
    assert "speedup" not in told.err
    found = call(*common, "--drafters", "pld", "--json").json
    assert list(found["stats"]) == ["drafter", *STATS]
    assert found["stats"]["accepted_length"] == found["metrics"]["accepted_length"] > 1
    assert found["stats"]["decode_s"] > 0 < found["stats"]["prefill_s"]
    alone = call(*common, "--json").json["stats"]
    assert (alone["drafter"], alone["accepted_length"], alone["acceptance_rate"]) == ("plain", 1.0, None)


def test_a_tokenizer_without_a_chat_template_falls_back_with_a_notice(call, folders, tmp_path):
    target = tmp_path / "bare"
    shutil.copytree(folders.target, target)
    for path in target.glob("chat_template*"):
        path.unlink()
    config = json.loads((target / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    told = call("generate", "--target", target, "--prompt", PROMPTS[0], "--max_new_tokens", 3, "--json")
    assert told.err == "template: plain, as the tokenizer has no chat template: see --template\n"
    plain = call("generate", "--target", target, "--prompt", PROMPTS[0], "--max_new_tokens", 3, "--json",
                 "--template", "plain")  # fmt: skip
    assert (plain.json["token_ids"], plain.err) == (told.json["token_ids"], "")
