"""`draftsmith data`: the report a person reads, the JSON a script reads, and the mask."""

from __future__ import annotations

import json

import pytest

from draftsmith.recipes.commands.data import data

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<eos>", "<|start|>", "<|end|>"]
    core.train_from_iterator(
        ["the lazy dog"], trainers.BpeTrainer(vocab_size=270, special_tokens=special, initial_alphabet=alphabet)
    )
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    made.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def file(tmp_path):
    rows = [
        {"prompt": "what [b]runs[/b]?", "output": "the dog", "category": "pets"},
        {"prompt": "who?", "output": "the lazy dog", "category": "pets"},
        {"label": 3},
        {"question_id": 7, "category": "open", "turns": ["one", "two"]},
        {"text": "the lazy dog"},
    ]
    path = tmp_path / "file.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    return str(path)


def run(capsys, *args, **kwargs) -> tuple[str, dict]:
    data(*args, json=True, **kwargs)
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def test_counts_reasons_and_places_are_shown_and_in_the_json(capsys, file):
    out, report = run(capsys, [file])
    assert "6 rows read, 4 used, 2 skipped" in out
    assert f"1 x no known field: {file} row 3" in out
    assert f"1 x not valid JSON: {file} row 6" in out
    assert (report["rows"], report["used"]) == (6, 4)
    assert report["kinds"] == {"pair": 2, "question": 1, "text": 1}
    assert report["categories"] == {"pets": 2, "open": 1, "": 1}


def test_lengths_are_those_of_the_texts(capsys, file):
    _, report = run(capsys, [file])
    assert report["lengths"]["answer characters"] == {
        "count": 2, "total": 19, "median": 9.5, "p95": pytest.approx(11.75), "longest": 12
    }  # fmt: skip
    assert report["lengths"]["turns"]["longest"] == 2
    assert report["lengths"]["document characters"]["total"] == 12
    assert "tokens given" not in report["lengths"]


def test_conversation_is_shown_as_served_with_its_mask(capsys, file, tokenizer):
    out, report = run(capsys, [file], tokenizer=tokenizer)
    assert "<|start|>user\nwhat [b]runs[/b]?<|end|>\n<|start|>assistant\n«the dog<|end|>»" in out
    assert out.count("«") == 1
    assert "\x1b[" not in out, "no colours where there is no terminal"
    assert report["lengths"]["tokens to learn"]["count"] == 4
    assert report["not_rendered"] == {}


def test_mask_is_in_colour_on_a_terminal(capsys, file, tokenizer, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out, _ = run(capsys, [file], tokenizer=tokenizer)
    assert "\x1b[1;32mthe dog<|end|>" in out
    assert "«" not in out


def test_show_and_limit(capsys, file, tokenizer):
    assert run(capsys, [file], tokenizer=tokenizer, show=0)[0].count("«") == 0
    assert run(capsys, [file], tokenizer=tokenizer, show=2)[0].count("«") == 2
    assert run(capsys, [file], limit=1)[1]["used"] == 1


def test_conversation_that_cannot_be_rendered_is_counted(capsys, tmp_path, tokenizer):
    path = tmp_path / "file.jsonl"
    talk = [{"from": "gpt", "value": "hello"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    path.write_text(json.dumps({"conversations": talk}) + "\n")
    out, report = run(capsys, [str(path)], tokenizer=tokenizer)
    assert "not rendered: 1 x this conversation starts with an answer" in out
    assert list(report["not_rendered"].values()) == [1]


def test_plain_format_and_template_kwargs(capsys, file, tokenizer):
    out, _ = run(capsys, [file], tokenizer=tokenizer, template="Q: {prompt} A:")
    assert "Q: what [b]runs[/b]? A:« the dog<eos>»" in out
    with pytest.raises(ValueError, match="template_kwargs"):
        data([file], tokenizer=tokenizer, template="plain", template_kwargs={"x": 1})


def test_wrong_input_is_one_clear_line(file, tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        data([str(tmp_path / "nowhere.jsonl")])
    with pytest.raises(ValueError, match="holds no tokenizer"):
        data([file], tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match="row 6 is not valid JSON"):
        data([file], on_bad="raise")
