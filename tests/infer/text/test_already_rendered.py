"""Prompts that are rendered already are kept, in every format, and ordinary text is never taken for one."""

from __future__ import annotations

import pytest

from draftsmith.infer.text.already_rendered import KNOWN
from draftsmith.infer.text.record import Message
from draftsmith.infer.text.templates import find_template

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SYSTEM = "A chat between a curious user and an assistant. The assistant gives polite answers to the user's questions. "
RENDERED = {
    "vicuna": ["USER: who? ASSISTANT:", SYSTEM + "USER: who? ASSISTANT:", "USER: a\nb\nASSISTANT: ",
               SYSTEM + "USER: who? ASSISTANT: me</s>USER: why? ASSISTANT:"],
    "Llama 2": ["[INST] who? [/INST]", "<s>[INST] <<SYS>>\nbe brief\n<</SYS>>\n\nwho? [/INST] "],
    "ChatML": ["<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\n",
               "<|im_start|>system\nx<|im_end|>\n<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"],
    "Llama 3": ["<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nwho?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n"],
    "Gemma": ["<bos><start_of_turn>user\nwho?<end_of_turn>\n<start_of_turn>model\n"],
    "Zephyr": ["<|system|>\n</s>\n<|user|>\nwho?</s>\n<|assistant|>\n"],
    "one_shot": ["A chat.\n### Human: who?\n### Assistant:"],
    "Alpaca": ["Below is an instruction.\n\n### Instruction:\nwho?\n\n### Response:\n"],
}  # fmt: skip
ORDINARY = [
    "who?",
    "USER: is this how a prompt begins?",
    "Explain this format: USER: hello ASSISTANT:",
    "What follows ASSISTANT:",
    "Our log says 'USER: hi ASSISTANT: hello'. What does it mean?",
    "The END USER: a study of the ASSISTANT:",
    "user: hi\nassistant:",
    "What do [INST] and [/INST] mean?",
    "Wrap it in [INST] and [/INST]",
    "Explain <|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>",
    "### Instruction: is a heading. Explain it.",
    "### Human: and ### Assistant: are headings",
    "Write a scene.\nHuman: hi\nAssistant:",
    "USER: ASSISTANT:",
    "",
]
CASES = [(name, text) for name, texts in RENDERED.items() for text in texts]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<|start|>", "<|end|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        ["who is it"], trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=alphabet)
    )
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", additional_special_tokens=special[2:]
    )
    made.chat_template = CHAT
    return made


def text_of(template, *messages):
    return template.tokenizer.decode(template.prompt_ids(list(messages)))


@pytest.mark.parametrize(("name", "text"), CASES)
@pytest.mark.parametrize("template", ["chat", "plain", "User says: {prompt} Answer:"])
def test_a_rendered_prompt_is_kept_with_its_one_bos(tokenizer, template, name, text):
    found = find_template(template, tokenizer, notice=lambda line: None)
    assert found.rendered_format([Message("user", text)]) == name
    assert text_of(found, Message("user", text)) == "<bos>" + text.removeprefix("<bos>")


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_wrapped(tokenizer, text):
    found = find_template("chat", tokenizer)
    assert found.rendered_format([Message("user", text)]) == ""
    assert text_of(found, Message("user", text)) == f"<bos><|start|>user\n{text}<|end|>\n<|start|>assistant\n"


def test_each_format_recognises_its_own_later_turns_only():
    for one in KNOWN:
        turn = one.turn.replace("{end}", one.end or "</s>").replace("{prompt}", "who?").lstrip()
        assert [other.name for other in KNOWN if other.matches(turn)] == [one.name]


@pytest.mark.parametrize("template", ["chat", "User says: {prompt} Answer:"])
def test_a_template_recognises_what_it_wrote_itself(tokenizer, template):
    found = find_template(template, tokenizer, notice=lambda line: None)
    asked = [Message("user", "who?"), Message("assistant", "me"), Message("user", "why?")]
    for messages in (asked[:1], asked):
        served = found.text(messages, generation=True)
        for text in (served, served.removeprefix("<bos>"), served.rstrip()):
            kept = [Message("user", text)]
            assert text_of(found, *kept) == "<bos>" + text.removeprefix("<bos>")
    whole = found.render([*asked[:1], Message("assistant", "it is me")])
    again = found.render([Message("user", found.text(asked[:1], generation=True)), Message("assistant", "it is me")])
    assert again == whole


def test_a_rendered_prompt_s_answer_ends_as_its_format_says(tokenizer):
    found = find_template("plain", tokenizer, notice=lambda line: None)

    def learned(prompt):
        rendered = found.render([Message("user", prompt), Message("assistant", "me")])
        return tokenizer.decode([t for t, mask in zip(rendered.token_ids, rendered.loss_mask) if mask])

    assert learned("USER: who? ASSISTANT:") == " me<eos>"
    assert learned("USER: who? ASSISTANT: ") == "me<eos>"
    assert learned(RENDERED["ChatML"][0]) == "me<|im_end|>"
    assert learned(RENDERED["Gemma"][0]) == "me<eos>", "<end_of_turn> is no token here"


def test_later_turns_are_rendered_like_the_first_or_kept(tokenizer):
    found = find_template("chat", tokenizer, notice=lambda line: None)
    first, answer = Message("user", "USER: who? ASSISTANT:"), Message("assistant", "me")
    served = "<bos>USER: who? ASSISTANT: me<eos>USER: why? ASSISTANT:"
    assert text_of(found, first, answer, Message("user", "why?")) == served
    whole = "USER: who? ASSISTANT: me USER: why? ASSISTANT:"
    assert text_of(found, first, answer, Message("user", whole)) == "<bos>" + whole


def test_a_system_message_before_a_rendered_prompt_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"already rendered \(vicuna\), so no system message can come before it"):
        find_template("chat", tokenizer).prompt_ids([Message("system", "x"), Message("user", "USER: a ASSISTANT:")])


def test_the_first_rendered_prompt_is_named_once(tokenizer):
    lines: list[str] = []
    found = find_template("auto", tokenizer, notice=lines.append)
    assert (found.name, lines) == ("chat", [])
    for _ in range(2):
        found.prompt_ids([Message("user", "USER: who? ASSISTANT:")])
    assert lines == ["prompts already rendered (vicuna) are kept; the first: USER: who? ASSISTANT:..."]


def test_a_tokenizer_without_a_chat_template_falls_back_to_plain_with_a_notice(tokenizer, capsys):
    bare = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>", eos_token="<eos>")
    found = find_template("auto", bare)
    assert capsys.readouterr().err == "template: plain, as the tokenizer has no chat template: see --template\n"
    assert found.name == "plain"
    assert found.fingerprint() == find_template("plain", bare).fingerprint()
    for name in ("plain", "Q: {prompt}\nA:"):
        assert find_template(name, bare).name == name
    assert capsys.readouterr().err == ""
