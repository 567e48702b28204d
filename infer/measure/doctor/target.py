"""Can a target verify drafts: does a tree come out right, and does greedy decoding equal `model.generate`?"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.drafters.recycling import Recycling
from draftsmith.infer.measure.calibrate.answers import Answered
from draftsmith.infer.measure.doctor import weights, words
from draftsmith.infer.measure.doctor.exam import Exam, logits_finite
from draftsmith.infer.measure.doctor.finding import Finding
from draftsmith.infer.measure.peers import TransformersRunner
from draftsmith.infer.measure.runners import Prompt
from draftsmith.infer.measure.ties import TieJudge
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.load import read_model
from draftsmith.infer.models.probe import probed_plan, quiet, tokens_to_try, tree_errors
from draftsmith.infer.models.runner.model_runner import ModelRunner
from draftsmith.infer.text.record import Record
from draftsmith.infer.text.templates import find_template
from draftsmith.infer.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Contexts behind which a tree is tried on the loaded weights.
CONTEXTS = (6, 29)


def examine_target(
    name: str,
    records: Sequence[Record],
    template: str,
    max_new_tokens: int,
    dtype: str,
    device: torch.device,
    say: Callable[[str], None],
) -> list[Finding]:
    """The findings on a target, in order. What cannot be loaded is a finding too, and ends the checks that need it."""
    try:
        tokenizer = load_tokenizer(name)
    except ValueError as problem:
        return [Finding.wrong("tokenizer", str(problem), "copy the tokenizer's files into the folder")]
    form = find_template(template, tokenizer, notice=lambda line: None)
    try:
        with quiet():
            model, missing = read_model(name, dtype)
    except ValueError as problem:
        return [Finding.wrong("files", str(problem), "copy or download it again"), _template(tokenizer, form.name)]
    model = model.to(device).eval()
    config = model.config.get_text_config()
    found = [weights.check_files(missing, f"{config.model_type}, {config.num_hidden_layers} layers")]
    found += [_ends(model, tokenizer), _template(tokenizer, form.name)]
    rows, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    outputs = len(rows) if head is None else len(head.weight)
    found.append(words.check_vocabulary(len(rows), outputs, len(tokenizer), 0.0))
    try:
        target = HFTarget(model, tokenizer)
    except ValueError as problem:
        refused = Finding.wrong("tree", str(problem), "it cannot verify drafts: use another target")
        return [*found, refused, Finding.unknown("greedy", "not tried: it cannot verify drafts")]
    found += [words.check_context(config, target.max_positions, None), _tree(target)]
    try:
        exam = Exam.sit(target, name, form, records, max_new_tokens, say=say)
    except ValueError as problem:
        found.append(Finding.unknown("greedy", f"not tried: {problem}"))
        ids = tokens_to_try(model, 16, 0)
        return [*found, _dtype(model, [Answered(0, "0", ids[:8], ids[8:])])]
    say("comparing with transformers' generate")
    found.append(_greedy(exam))
    return [*found, _dtype(model, exam.answers)]


def _dtype(model: Any, answers: Sequence[Answered]) -> Finding:
    return weights.check_dtype(model.state_dict().items(), model.dtype, lambda: logits_finite(model, answers))


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> Finding:
    """Whether anything ends an answer."""
    check, named = "special tokens", model.generation_config.eos_token_id
    ends = {named} if isinstance(named, int) else set(named or ())
    own = tokenizer.eos_token_id
    mend = "write the ids that end an answer as eos_token_id into generation_config.json"
    if not ends and own is None:
        return Finding.wrong(check, "no eos_token_id: no answer would ever end by itself", mend)
    if ends and own is not None and own not in ends:
        return Finding.wrong(check, f"answers end with {sorted(ends)}, and the tokenizer's eos is {own}", mend)
    shown = ", ".join(str(tokenizer.convert_ids_to_tokens(end)) for end in sorted(ends or {own}))
    return Finding.ok(check, f"answers end with {shown}")


def _template(tokenizer: PreTrainedTokenizerBase, name: str) -> Finding:
    if not tokenizer.chat_template:
        return Finding.unknown("template", f"the tokenizer has none: prompts are served as {name}", "give --template")
    text = words.rendered(tokenizer)
    if missing := [turn["content"] for turn in words.CONVERSATION if turn["content"] not in text]:
        return Finding.wrong("template", f"the chat template drops {missing[0]!r}: {text[:60]!r}", "mend the template")
    return Finding.ok("template", "the chat template renders a conversation of several turns")


@torch.inference_mode()
def _tree(target: HFTarget) -> Finding:
    if not isinstance(target.lm, ModelRunner):
        return Finding.ok("tree", "its layers carry a state, so it takes chains and no trees; a chain comes out right")
    errors = [error for error in tree_errors(target.model, probed_plan(target.model), CONTEXTS) if error == error]
    if not errors:
        return Finding.unknown("tree", "its logits are NaN or infinite: see dtype")
    # Of the nodes, the median: an expert that rounding chooses differently is no fault.
    error = statistics.median(errors)
    return Finding.ok("tree", f"a tree's logits are those of its paths, to {error:.1g} of their spread")


def _greedy(exam: Exam) -> Finding:
    """The engine's answers, plain and with trees of a drafter, against `generate`'s."""
    stops = exam.target.stops(exam.max_new_tokens)
    theirs = TransformersRunner("generate", exam.model, exam.target.tokenizer, Settings(), stops).run(
        [Prompt(one.key, list(one.prompt)) for one in exam.answers]
    )
    judge, ties, places = TieJudge(exam.model, eos_ids=sorted(stops.ids)), 0, 0
    ways = {"plain": exam.decode(Empty()), "with drafted trees": exam.decode(Recycling())}
    for way, ours in ways.items():
        for one, mine, other in zip(exam.answers, ours, theirs):
            judged = judge.judge(one.prompt, other.token_ids, mine.token_ids)
            if judged is not None and not judged.tie:
                return Finding.wrong(
                    "greedy",
                    f"{way}, the answer to prompt {one.number + 1} leaves generate's at token {judged.index + 1}",
                    "do not draft for it; `draftsmith bench --peers generate` shows how far they are apart",
                )
            ties, places = ties + (judged is not None), places + 1
    tied = f", {ties} of {places} up to a numeric tie" if ties else ""
    accepted = max(trace.accepted for one in ways["with drafted trees"] for trace in one.traces)
    return Finding.ok("greedy", f"token for token generate's, plain and drafted (up to {accepted} at once){tied}")
