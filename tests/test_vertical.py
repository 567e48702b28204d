"""The spine: a tiny target -> SFT and SoFT drafts -> loaded -> drafting through our step equals plain decoding ->
exported -> transformers' assistant_model in a process that does not know us."""

import json
import subprocess
import sys

import pytest
import torch

from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.drafters.small_lm import SmallLM
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.models.load import load_model, load_target
from draftsmith.infer.text.record import Message
from draftsmith.infer.text.templates import find_template
from draftsmith.train.export.export import export_draft
from draftsmith.train.objectives.sft import SFT
from draftsmith.train.objectives.soft import SoFT
from draftsmith.train.run.config import Machine, Optim, Text, TrainConfig, Watch
from draftsmith.train.run.run import train_draft
from draftsmith.train.run.target import train_target

PROMPTS = ["count from 3", "count from 11", "say 4 and 5"]


@pytest.fixture(scope="module")
def spine(tmp_path_factory):
    """A target trained from scratch, and drafts of it."""
    root = tmp_path_factory.mktemp("spine")
    data = root / "chats.jsonl"
    rows = []
    for i in range(60):
        said = " ".join(str(i + step) for step in range(8))
        rows.append(
            {"messages": [{"role": "user", "content": f"count from {i}"}, {"role": "assistant", "content": said}]}
        )
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = Text(max_length=128, held_out=0.1, cache=str(root / "cache"))
    machine = Machine(device="cpu", precision="32-true", workers=0)
    config = TrainConfig(
        str(root / "target" / "start"), [str(data)], str(root / "target"), num_layers=4, max_steps=60, text=text,
        machine=machine, optim=Optim(lr=1e-2, batch_size=4, name="muon"), watch=Watch(val_every=0, val_prompts=0),
    )  # fmt: skip
    train_target(config, vocab_size=300, hidden_size=64)
    common = {
        "target": str(root / "target"), "data": [str(data)], "num_layers": 2, "max_steps": 30, "text": text,
        "machine": machine, "optim": Optim(lr=3e-3, batch_size=4), "watch": Watch(val_every=0, val_new_tokens=16),
    }  # fmt: skip
    for name, objective in (("sft", SFT()), ("soft", SoFT([1, 2]))):
        train_draft(objective, TrainConfig(out=str(root / name), **common))
    return root


def rows_of(target):
    template = find_template("chat", target.tokenizer)
    ids = [template.prompt_ids([Message("user", text)]) for text in PROMPTS]
    return [Row(f"q{i}", prompt, stops=Stops(24, frozenset([2]))) for i, prompt in enumerate(ids)]


@pytest.mark.parametrize("name", ["sft", "soft"])
def test_drafting_with_what_was_trained_says_what_the_target_says_and_is_accepted(spine, name):
    from draftsmith.infer.drafters.controls import Empty

    target = load_target(str(spine / "target"), dtype="float64", device="cpu")
    drafter = SmallLM(load_model(str(spine / name), dtype="float64", device="cpu")[0], num_draft_tokens=4)
    texts = {}
    for label, used in (("plain", Empty()), (name, drafter)):
        used.bind(target)
        texts[label] = generate(target, used, rows_of(target), batch_size=2)
    assert [row.token_ids for row in texts[name]] == [row.token_ids for row in texts["plain"]]
    traces = [trace for row in texts[name] for trace in row.traces]
    assert max(trace.accepted for trace in traces) >= 2
    assert sum(trace.committed for trace in traces) > 1.5 * len(traces)


def test_training_raised_accepted_length_on_held_out_prompts(spine):
    import csv

    with (spine / "soft" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "held_out"]
    for exit in (1, 2):
        lengths = [float(row[f"accepted_length_exit_{exit}"]) for row in rows]
        assert lengths[-1] > lengths[0]


FRESH = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
target = AutoModelForCausalLM.from_pretrained(sys.argv[1])
for folder in sys.argv[2:]:
    draft = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "count from 9"}], add_generation_prompt=True,
                                        return_tensors="pt")["input_ids"]
    kwargs = {"do_sample": False, "max_new_tokens": 20, "attention_mask": torch.ones_like(ids)}
    plain = target.generate(ids, **kwargs)
    assisted = target.generate(ids, assistant_model=draft, **kwargs)
    logits = draft(torch.tensor([[5, 9, 20, 30]])).logits[0].tolist()
    print(json.dumps({"logits": logits, "ours": "draftsmith" in sys.modules,
                      "same": plain.tolist() == assisted.tolist(), "config": draft.config.to_dict()}))
"""


def test_a_process_without_draftsmith_loads_both_exits_and_assists_with_them(spine, tmp_path):
    export_draft(str(spine / "soft"), tmp_path / "exit1", exit=1)
    model = load_model(str(spine / "soft"), device="cpu")[0]
    with torch.no_grad():
        states = model(torch.tensor([[5, 9, 20, 30]]), output_hidden_states=True).hidden_states
        ours = {"soft": model.lm_head(states[-1]), "exit1": model.lm_head(model.model.norm(states[1]))}
    folders = {"soft": spine / "soft", "exit1": tmp_path / "exit1"}
    words = [sys.executable, "-c", FRESH, str(spine / "target"), *map(str, folders.values())]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, line in zip(folders, done.stdout.splitlines()[-2:], strict=True):
        told = json.loads(line)
        assert not told["ours"]
        assert told["same"]
        torch.testing.assert_close(torch.tensor(told["logits"]), ours[name][0], rtol=0, atol=1e-5)
        assert told["config"].get("sorted_exits") == ([1, 2] if name == "soft" else None)
        assert told["config"]["num_hidden_layers"] == (2 if name == "soft" else 1)
