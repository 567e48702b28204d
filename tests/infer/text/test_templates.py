"""Rendering as served: hand-checked masks, token-exact prefixes, refusals."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from small_tokenizer import CHATML, make_tokenizer

from draftsmith.infer.text.record import Message, Record
from draftsmith.infer.text.rendering import last_answer
from draftsmith.infer.text.templates import (
    Rendered,
    chat_template,
    fastchat_template,
    find_template,
    load_tokenizer,
    plain_template,
    render_record,
)

# Drops the reasoning of all answers but the newest, and asks for it in the generation prompt.
THINKING = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1].strip() }}{% else %}{{ m.content }}{% endif %}"
    "<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% if thinking is not defined or thinking %}<think>\n{% endif %}"
    "{% endif %}"
)
TALK = [
    Message("user", "hello"),
    Message("assistant", "yes no"),
    Message("user", "what"),
    Message("assistant", "maybe"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def learned(tokenizer, rendered: Rendered) -> list[str]:
    """The spans with mask 1, as text."""
    spans, previous = [], 0
    for token, mask in zip(rendered.token_ids, rendered.loss_mask, strict=True):
        if mask and not previous:
            spans.append([])
        if mask:
            spans[-1].append(token)
        previous = mask
    return [tokenizer.decode(span) for span in spans]


def real_tokenizer(name: str):
    root = os.environ.get("DRAFTSMITH_DATA")
    if not root or not (Path(root) / "tokenizers" / name).is_dir():
        pytest.skip(f"DRAFTSMITH_DATA does not name a folder with tokenizers/{name}")
    return load_tokenizer(Path(root) / "tokenizers" / name)


def test_prompt_ids_are_the_chat_template_with_its_generation_prompt(tokenizer):
    text = "<|start|>user\nhello<|end|>\n<|start|>assistant\n"
    assert chat_template(tokenizer).prompt_ids(TALK[:1]) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_mask_covers_answers_with_their_end_token_and_nothing_else(tokenizer):
    rendered = chat_template(tokenizer).render(TALK)
    assert learned(tokenizer, rendered) == ["yes no<|end|>", "maybe<|end|>"]
    assert tokenizer.decode(rendered.token_ids) == (
        "<|start|>user\nhello<|end|>\n<|start|>assistant\nyes no<|end|>\n"
        "<|start|>user\nwhat<|end|>\n<|start|>assistant\nmaybe<|end|>"
    )


def test_mask_hand_checked_token_by_token(tokenizer):
    one = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<|start|>", "<|end|>")}
    ids = chat_template(tokenizer).render(TALK[:2]).token_ids
    mask = chat_template(tokenizer).render(TALK[:2]).loss_mask
    answer = tokenizer("yes no", add_special_tokens=False)["input_ids"]
    assert ids[-1] == one["<|end|>"]
    assert ids[-1 - len(answer) : -1] == answer
    assert mask == [0] * (len(ids) - len(answer) - 1) + [1] * (len(answer) + 1)


def test_each_prompt_is_a_token_exact_prefix_of_what_is_trained(tokenizer):
    template = chat_template(tokenizer)
    ids = template.render(TALK).token_ids
    for turn in (1, 3):
        prompt = template.prompt_ids(TALK[:turn])
        assert ids[: len(prompt)] == prompt


def test_answer_that_reads_like_markup_or_like_the_template_is_masked_whole(tokenizer):
    for answer in ("e", "assistant", "<|end", "end|>", "user\nuser", "<think>"):
        rendered = chat_template(tokenizer).render([TALK[0], Message("assistant", answer)])
        assert learned(tokenizer, rendered) == [answer + "<|end|>"]


def test_answer_recorded_with_its_end_token_has_it_once(tokenizer):
    talk = [TALK[0], Message("assistant", "yes no<|end|>"), *TALK[2:]]
    assert chat_template(tokenizer).render(talk) == chat_template(tokenizer).render(TALK)
    plain = plain_template(tokenizer, "Q: {prompt}\nA:")
    talk = [TALK[0], Message("assistant", "yes no<eos>"), *TALK[2:]]
    assert plain.render(talk) == plain.render(TALK)


def test_merge_across_the_border_keeps_the_prompt_as_served():
    tokenizer = make_tokenizer(sentences=["a:::b a:::b :::b", "::: :::b a:::"] * 20, size=300)
    template = plain_template(tokenizer, "{prompt}")
    talk = [Message("user", "a::"), Message("assistant", ":b")]
    prompt = template.prompt_ids(talk[:1])
    joint = tokenizer("a:::b<eos>", add_special_tokens=False)["input_ids"]
    assert joint[: len(prompt)] != prompt, "the tokenizer must merge here for this test to say anything"
    rendered = template.render(talk)
    assert rendered.token_ids[: len(prompt)] == prompt
    assert rendered.loss_mask[: len(prompt)] == [0] * len(prompt)
    assert learned(tokenizer, rendered) == [":b<eos>"]


def test_conversation_with_a_merge_across_the_border_is_split_where_the_next_prompt_differs():
    tokenizer = make_tokenizer(sentences=["a:::b a:::b :::b", "::: :::b a:::"] * 20, size=300)
    template = plain_template(tokenizer, "{prompt}")
    talk = [Message("user", "a::"), Message("assistant", ":b"), Message("user", "a"), Message("assistant", "b")]
    with pytest.raises(ValueError, match="served as 2 sequences"):
        template.render(talk)
    first, second = template.render_served(talk)
    assert learned(tokenizer, first) == [":b<eos>"]
    assert learned(tokenizer, second) == ["b<eos>"]
    assert second.token_ids[: len(template.prompt_ids(talk[:3]))] == template.prompt_ids(talk[:3])


def test_template_that_drops_earlier_reasoning_gives_one_sample_per_turn():
    tokenizer = make_tokenizer(THINKING)
    template = chat_template(tokenizer)
    talk = [
        TALK[0],
        Message("assistant", "<think>\nmaybe\n</think>\n\nyes"),
        TALK[2],
        Message("assistant", "no", reasoning="maybe"),
    ]
    first, second = template.render_served(talk)
    assert tokenizer.decode(first.token_ids).endswith("assistant\n<think>\nmaybe\n</think>\n\nyes<|end|>")
    assert learned(tokenizer, first) == ["maybe\n</think>\n\nyes<|end|>"]
    assert "maybe" not in tokenizer.decode(template.prompt_ids(talk[:3]))
    assert learned(tokenizer, second) == ["maybe\n</think>\n\nno<|end|>"]


def test_answer_without_the_reasoning_that_was_asked_for_is_refused_unless_thinking_is_off():
    tokenizer = make_tokenizer(THINKING)
    with pytest.raises(ValueError, match="</think>"):
        chat_template(tokenizer).render_served(TALK)
    rendered = chat_template(tokenizer, {"thinking": False}).render(TALK)
    assert learned(tokenizer, rendered) == ["yes no<|end|>", "maybe<|end|>"]


def test_template_that_ends_its_last_turn_otherwise_is_split_as_it_was_served():
    ends = "{{ '<eos>' if loop.last and m.role == 'assistant' else '<|end|>' }}"
    tokenizer = make_tokenizer(CHATML.replace("<|end|>", ends))
    samples = chat_template(tokenizer).render_served(TALK)
    assert [learned(tokenizer, sample) for sample in samples] == [["yes no<eos>"], ["maybe<eos>"]]


def test_bos_at_every_turn_is_given_not_learned():
    tokenizer = make_tokenizer(
        "{% for m in messages %}{% if m.role == 'user' %}<bos>[ {{ m.content }} ]"
        "{% else %} {{ m.content }} <eos>{% endif %}{% endfor %}"
    )
    rendered = chat_template(tokenizer).render(TALK)
    assert tokenizer.decode(rendered.token_ids) == "<bos>[ hello ] yes no <eos><bos>[ what ] maybe <eos>"
    assert learned(tokenizer, rendered) == [" yes no <eos>", " maybe <eos>"]


def test_reasoning_that_the_template_does_not_show_is_refused(tokenizer):
    with pytest.raises(ValueError, match="reasoning"):
        chat_template(tokenizer).render([TALK[0], Message("assistant", "yes", reasoning="because")])


def test_system_message_is_added_only_where_there_is_none(tokenizer):
    template = chat_template(tokenizer, system="the fox")
    assert tokenizer.decode(template.prompt_ids(TALK[:1])).startswith("<|start|>system\nthe fox<|end|>")
    own = template.prompt_ids([Message("system", "dog"), TALK[0]])
    assert tokenizer.decode(own).startswith("<|start|>system\ndog<|end|>")


def test_bos_comes_once_whether_the_text_or_the_tokenizer_brings_it():
    bos = make_tokenizer("<bos>" + CHATML, bos=True)
    assert chat_template(bos).prompt_ids(TALK[:1]).count(bos.bos_token_id) == 1
    for format in ("USER: {prompt} ASSISTANT:", "<bos>USER: {prompt} ASSISTANT:"):
        ids = plain_template(bos, format).prompt_ids(TALK[:1])
        assert ids[0] == bos.bos_token_id
        assert ids.count(bos.bos_token_id) == 1


def test_plain_format_puts_a_space_before_the_answer_and_eos_behind(tokenizer):
    rendered = plain_template(tokenizer, "USER: {prompt} ASSISTANT:").render(TALK)
    text = "USER: hello ASSISTANT: yes no<eos>USER: what ASSISTANT: maybe<eos>"
    assert tokenizer.decode(rendered.token_ids) == text
    assert learned(tokenizer, rendered) == [" yes no<eos>", " maybe<eos>"]


def test_plain_format_leaves_braces_in_prompts_alone(tokenizer):
    ids = plain_template(tokenizer, "Q {prompt}\nA ").prompt_ids([Message("user", "{x} {prompt}")])
    assert tokenizer.decode(ids) == "Q {x} {prompt}\nA "


@pytest.mark.parametrize("format", ["no place", "{prompt} {prompt}"])
def test_plain_format_must_hold_prompt_once(tokenizer, format):
    with pytest.raises(ValueError, match="once"):
        plain_template(tokenizer, format)


def test_fastchat_vicuna_renders_both_turns_as_served(tokenizer):
    pytest.importorskip("fastchat.conversation", reason="fschat is in the extra `train`")
    template = fastchat_template("vicuna_v1.1", tokenizer)
    rendered = template.render(TALK)
    assert learned(tokenizer, rendered) == [" yes no</s>", " maybe</s>"]
    assert tokenizer.decode(template.prompt_ids(TALK[:3])).endswith(
        "USER: hello ASSISTANT: yes no</s>USER: what ASSISTANT:"
    )
    with pytest.raises(ValueError, match=r"unknown template 'nosuch'; give chat, plain.*FastChat's are listed by"):
        fastchat_template("nosuch", tokenizer)
    with pytest.raises(ValueError, match=r"unknown template 'vicuna_v11'; did you mean vicuna_v1\.1"):
        fastchat_template("vicuna_v11", tokenizer)


def test_missing_fastchat_names_the_extra(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastchat.conversation", None)
    with pytest.raises(ValueError, match=r"draftsmith\[train\]"):
        fastchat_template("vicuna_v1.1", tokenizer)


def test_tokenizer_without_chat_template_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"no chat template.*\{prompt\}"):
        chat_template(make_tokenizer(None))


def test_conversation_that_the_template_refuses_is_one_clear_line():
    refusing = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="refuses this conversation: roles must alternate"):
        chat_template(refusing).prompt_ids(TALK[:1])


@pytest.mark.parametrize(
    ("talk", "why"), [(TALK[:1], "no answer"), (TALK[1:], "starts with an answer"), ([], "no answer")]
)
def test_conversation_without_a_served_answer_is_refused(tokenizer, talk, why):
    with pytest.raises(ValueError, match=why):
        chat_template(tokenizer).render(talk)


def test_find_template_by_name(tokenizer):
    made = {"chat": chat_template(tokenizer), "plain": plain_template(tokenizer)}
    made["Q: {prompt}"] = plain_template(tokenizer, "Q: {prompt}")
    for name, template in made.items():
        assert find_template(name, tokenizer).fingerprint() == template.fingerprint()
    with pytest.raises(ValueError, match="template_kwargs"):
        find_template("plain", tokenizer, {"thinking": False})


def test_record_with_token_ids_is_used_as_it_is(tokenizer):
    template = chat_template(tokenizer)
    record = Record("1", prompt_token_ids=[5, 6], token_ids=[7, 8, 9])
    assert render_record(template, record) == [Rendered([5, 6, 7, 8, 9], [0, 0, 1, 1, 1])]
    prompt = template.prompt_ids(TALK[:1])
    asked = Record("2", messages=TALK[:2], token_ids=[7, 8])
    assert render_record(template, asked) == [Rendered([*prompt, 7, 8], [0] * len(prompt) + [1, 1])]


def test_token_ids_by_turn_are_one_sample_where_a_turn_goes_on_from_the_last_and_several_where_not(tokenizer):
    template = chat_template(tokenizer)
    record = Record("1", prompt_token_ids_by_turn=[[5], [5, 6, 7]], token_ids_by_turn=[[6], [8, 9]])
    (one,) = render_record(template, record)
    assert (one.token_ids, one.loss_mask) == ([5, 6, 7, 8, 9], [0, 1, 0, 1, 1])
    record = Record("2", prompt_token_ids_by_turn=[[5], [4, 6, 7]], token_ids_by_turn=[[6], [8, 9]])
    assert [sample.token_ids for sample in render_record(template, record)] == [[5, 6], [4, 6, 7, 8, 9]]


def test_document_is_learned_whole_but_for_bos():
    tokenizer = make_tokenizer(bos=True)
    (rendered,) = render_record(chat_template(tokenizer), Record("1", text="the lazy dog"))
    assert rendered.token_ids[0] == tokenizer.bos_token_id
    assert learned(tokenizer, rendered) == ["the lazy dog"]
    assert rendered.loss_mask[0] == 0


@pytest.mark.parametrize("name", ["chat", "USER: {prompt} ASSISTANT:"])
def test_the_last_answer_of_several_turns_begins_behind_the_last_question(folders, name):
    template = find_template(name, folders.tokenizer)
    messages = [Message("user", "one"), Message("assistant", "two"), Message("user", "three")]
    prompt, answer = last_answer(template, [*messages, Message("assistant", "four")])
    assert prompt == template.prompt_ids(messages)
    assert folders.tokenizer.decode(answer, skip_special_tokens=True).strip() == "four"


def test_template_fingerprint_sees_template_kwargs_system_and_tokenizer(tokenizer):
    prints = [
        chat_template(tokenizer).fingerprint(),
        chat_template(tokenizer, {"thinking": False}).fingerprint(),
        chat_template(tokenizer, system="x").fingerprint(),
        chat_template(make_tokenizer(THINKING)).fingerprint(),
        chat_template(make_tokenizer(sentences=["zebras zigzag"] * 9)).fingerprint(),
        plain_template(tokenizer).fingerprint(),
        plain_template(tokenizer, "Q {prompt}").fingerprint(),
    ]
    assert len(set(prints)) == len(prints)
    assert chat_template(make_tokenizer()).fingerprint() == prints[0]


def test_llama2_prompt_is_bos_and_text_and_the_answer_continues_it():
    tokenizer = real_tokenizer("llama2")
    template = plain_template(tokenizer, "USER: {prompt} ASSISTANT:")
    talk = [Message("user", "hi"), Message("assistant", "yes")]
    prompt = template.prompt_ids(talk[:1])
    assert prompt == tokenizer("USER: hi ASSISTANT:")["input_ids"]
    assert prompt[0] == tokenizer.bos_token_id
    rendered = template.render(talk)
    assert rendered.token_ids == [*prompt, 4874, 2]  # "▁yes", "</s>"
    assert rendered.loss_mask == [0] * len(prompt) + [1, 1]


def test_llama2_answer_behind_a_space_does_not_gain_a_second_one():
    tokenizer = real_tokenizer("llama2")
    template = plain_template(tokenizer, "Q: {prompt}\nA: ")
    talk = [Message("user", "hi"), Message("assistant", "yes")]
    rendered = template.render(talk)
    prompt = template.prompt_ids(talk[:1])
    assert rendered.token_ids[: len(prompt)] == prompt
    assert tokenizer.decode(rendered.token_ids) == "<s> Q: hi\nA: yes</s>"


def test_gpt2_mask_on_real_tokens():
    tokenizer = real_tokenizer("gpt2")
    rendered = plain_template(tokenizer, "USER: {prompt} ASSISTANT:").render(TALK)
    assert learned(tokenizer, rendered) == [" yes no<|endoftext|>", " maybe<|endoftext|>"]
