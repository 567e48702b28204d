"""Is a draft model, plain or sorted, what it should be for its target?"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from draftsmith.infer.costs.identity import short_name
from draftsmith.infer.drafters.lm_drafter import LMDrafter
from draftsmith.infer.drafters.sd2 import SD2
from draftsmith.infer.drafters.small_lm import SmallLM
from draftsmith.infer.measure.calibrate.answers import Answered
from draftsmith.infer.measure.doctor import exits, rotary, weights, words
from draftsmith.infer.measure.doctor.acceptance import CHECK as ACCEPTANCE
from draftsmith.infer.measure.doctor.acceptance import check_acceptance
from draftsmith.infer.measure.doctor.exam import Exam, gain, logits_finite, losses_by_layer, token_losses
from draftsmith.infer.measure.doctor.finding import Finding
from draftsmith.infer.measure.doctor.weights import Mend, MendTried
from draftsmith.infer.models.load import read_model
from draftsmith.infer.models.probe import quiet
from draftsmith.infer.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Chains, all of the same length: accepted_length then depends on the draft alone.
LENGTH = 4
# Answers that are read for what a glance shows.
GLANCE = 4


@dataclass(frozen=True, slots=True)
class Subject:
    """A model in float32, and the exits that it is run with. `stored`: its weights as the folder holds them."""

    name: str
    model: Any
    missing: Sequence[str]
    exits: Sequence[int]
    stored: Sequence[tuple[str, torch.Tensor]]

    @classmethod
    def read(cls, name: str, device: torch.device, given: Sequence[int] | None) -> Subject:
        """ValueError, in one line, if it cannot be loaded."""
        with quiet():
            model, missing = read_model(name)
        stored = [(key, one.detach()) for key, one in model.state_dict().items()]
        exits = list(given or getattr(model.config, "sorted_exits", None) or ())
        return cls(name, model.float().to(device).eval(), missing, exits, stored)

    @property
    def config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def embedding(self) -> torch.nn.Parameter:
        weight: torch.nn.Parameter = self.model.get_input_embeddings().weight
        return weight

    @property
    def head(self) -> torch.nn.Parameter:
        weight: torch.nn.Parameter = self.model.get_output_embeddings().weight
        return weight

    @property
    def tied(self) -> bool:
        return self.embedding is self.head

    def others(self) -> dict[str, torch.Tensor]:
        """The weights that no check of their own compares with the reference."""
        apart = {id(self.embedding), id(self.head), *(id(one.weight) for _, one in rotary.projections(self.model))}
        return {name: one for name, one in self.model.named_parameters() if id(one) not in apart}


def examine_draft(
    name: str, exam: Exam, reference: str | None = None, given_exits: Sequence[int] | None = None
) -> list[Finding]:
    """The findings on a draft model, in order. What cannot be loaded is a finding too, and ends the checks that need
    it."""
    device = exam.model.get_input_embeddings().weight.device
    trained = Subject.read(reference, device, None) if reference is not None else None
    tokenizer, words_found = _tokenizer(name, exam)
    try:
        subject = Subject.read(name, device, given_exits)
    except ValueError as problem:
        again = Finding.wrong("files", str(problem), "export or copy it again")
        return [again, *words_found, Finding.unknown(ACCEPTANCE, "not measured: it could not be loaded")]
    kind = f"{subject.config.model_type}, {subject.config.num_hidden_layers} layers"
    found = [weights.check_files(subject.missing, kind), *_origin(subject.name, exam), *words_found]
    answers = exam.fitting(subject.model)
    drafter, refusal = _bound(subject, exam)
    finite = (lambda: logits_finite(drafter.model, answers[:GLANCE])) if drafter is not None and answers else None
    # Where float32 cannot run it, there is nothing to try.
    well = bool(answers) and logits_finite(subject.model, answers)
    exam.say("trying what may be wrong with the weights")
    if tokenizer is not None:
        found += _of_text(subject, tokenizer, trained, exam, answers if well else [])
    found += _of_weights(subject, trained, exam, answers if well else [])
    found.append(weights.check_dtype(subject.stored, exam.model.dtype, finite))
    if subject.exits:
        losses = losses_by_layer(subject.model, answers) if well else []
        known = list(trained.exits) or None if trained is not None else None
        vocab = len(tokenizer) if tokenizer is not None else subject.config.vocab_size
        found.append(exits.check_exits(subject.exits, subject.config.num_hidden_layers, known, losses, vocab))
    found.append(_acceptance(drafter, refusal, trained, exam))
    return found


def _tokenizer(name: str, exam: Exam) -> tuple[PreTrainedTokenizerBase | None, list[Finding]]:
    target = exam.target.tokenizer
    assert target is not None
    try:
        own = load_tokenizer(name)
    except ValueError as problem:
        return None, [Finding.wrong("tokenizer", str(problem), "copy the target's tokenizer files into the folder")]
    return own, [words.check_tokenizer(own, target)]


def _origin(name: str, exam: Exam) -> list[Finding]:
    """For which target it was trained, if a run.json says so."""
    try:
        run = json.loads((Path(name).expanduser() / "run.json").read_text(encoding="utf-8"))
        trained_for = str(run["settings"]["target"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if short_name(trained_for) == short_name(exam.name):
        return [Finding.ok("target", f"trained for {short_name(trained_for)}, by its run.json")]
    return [
        Finding.unknown("target", f"trained for {trained_for}, by its run.json: another target may accept fewer drafts")
    ]


def _of_text(
    subject: Subject, own: PreTrainedTokenizerBase, trained: Subject | None, exam: Exam, answers: Sequence[Answered]
) -> list[Finding]:
    target = exam.target.tokenizer
    assert target is not None
    same = words.check_tokenizer(own, target).verdict == "ok"
    config = subject.model.generation_config if same else None
    rows, outputs = len(subject.embedding), len(subject.head)
    return [
        words.check_special_tokens(own, target, config, exam.target.eos_ids),
        words.check_vocabulary(rows, outputs, len(own), padding_share(subject.model, len(own), answers[:GLANCE])),
        words.check_context(subject.config, exam.target.max_positions, trained and trained.config),
        words.check_template(own, subject.model.config, exam.template, same),
    ]


def _of_weights(subject: Subject, trained: Subject | None, exam: Exam, answers: Sequence[Answered]) -> list[Finding]:
    tried = _trials(subject, exam, answers) if answers and trained is None else {}
    target = exam.model
    tokens = len(exam.target.tokenizer or ())
    theirs = (target.get_input_embeddings().weight, target.get_output_embeddings().weight)
    before = (trained.embedding, trained.head) if trained is not None else (None, None)
    tables = (subject.embedding, subject.head)
    found = [
        weights.check_table(check, own, their, known, tried.get(check, []), tokens)
        for check, own, their, known in zip(("embedding", "head"), tables, theirs, before)
    ]
    if subject.tied or (trained is not None and trained.tied):
        found[1] = weights.check_shared(subject.tied, trained.tied if trained else subject.tied, found[0])
    order = rotary.check_rotary(
        subject.model, subject.config, trained and trained.model, target.config.get_text_config(),
        tried.get(rotary.CHECK, []),
    )  # fmt: skip
    found.append(order)
    if trained is not None:
        depths = (subject.config.num_hidden_layers, trained.config.num_hidden_layers)
        found.append(weights.check_equal(subject.others(), dict(trained.model.named_parameters()), depths))
    return found


def _trials(subject: Subject, exam: Exam, answers: Sequence[Answered]) -> dict[str, list[MendTried]]:
    """What was tried, by check."""
    before_N, guessing = token_losses(subject.model, answers), math.log(subject.config.vocab_size)
    target = exam.model
    tables = {"embedding": subject.embedding, "head": subject.head}
    lent = {"embedding": target.get_input_embeddings().weight, "head": target.get_output_embeddings().weight}
    again = "copy the embedding and the head from the trained draft, or train it again"

    def tried(suspected: str, mend: str, mended: Mend) -> MendTried:
        with mended():
            return MendTried(suspected, gain(before_N, token_losses(subject.model, answers), guessing), mend)

    found: dict[str, list[MendTried]] = {}
    for step in (1, -1):
        moved = {id(one): (one, one.data.roll(step, 0)) for one in tables.values()}
        trial = tried(f"its ids are shifted by {-step:+d}", again, partial(replaced, [*moved.values()]))
        for check in tables:
            found.setdefault(check, []).append(trial)
    for check, own in tables.items():
        if own.shape[1] == lent[check].shape[1]:
            rows = own.data.clone()
            count = min(len(rows), len(lent[check]))
            rows[:count] = lent[check][:count].to(rows)
            what = f"the {check} does not fit the layers, and the target's would"
            found[check].append(tried(what, again, partial(replaced, [(own, rows)])))
    base = rotary.rope_of(target.config.get_text_config()).get("rope_theta")
    bases = [float(base)] if isinstance(base, int | float) else []
    found[rotary.CHECK] = [tried(*one) for one in rotary.suspects(subject.model, subject.config, bases)]
    return weights.likeliest(found)


@contextlib.contextmanager
def replaced(pairs: Sequence[tuple[torch.nn.Parameter, torch.Tensor]]) -> Iterator[None]:
    """Inside, these parameters hold other numbers."""
    before = [parameter.data for parameter, _ in pairs]
    try:
        for parameter, other in pairs:
            parameter.data = other
        yield
    finally:
        for (parameter, _), held in zip(pairs, before):
            parameter.data = held


@torch.inference_mode()
def padding_share(model: Any, tokens: int, answers: Sequence[Answered]) -> float:
    """The share of places in these answers where the likeliest id is none of the tokenizer's."""
    beyond = total = 0
    for one in answers:
        ids_1T = torch.tensor([[*one.prompt, *one.answer]], device=model.get_input_embeddings().weight.device)
        likeliest_T = model(input_ids=ids_1T, use_cache=False).logits[0].argmax(-1)
        beyond, total = beyond + int((likeliest_T >= tokens).sum()), total + len(likeliest_T)
    return beyond / max(total, 1)


def drafter_of(name: str, exits: Sequence[int]) -> LMDrafter:
    """Chains from the whole model."""
    chain: dict[str, Any] = {
        "num_draft_tokens": LENGTH, "top_k": 1, "min_confidence": 0.0, "calibration": "none", "costs": "none",
        "int8": False,
    }  # fmt: skip
    with quiet():
        return SD2(name, exits, selection="fixed", exit=exits[-1], **chain) if exits else SmallLM(name, **chain)


def _bound(subject: Subject, exam: Exam) -> tuple[Any | None, str]:
    """The drafter as it is run, or why it cannot be."""
    try:
        drafter = drafter_of(subject.name, subject.exits)
        drafter.bind(exam.target)
    except ValueError as problem:
        return None, str(problem)
    return drafter, ""


def _acceptance(drafter: Any | None, refusal: str, trained: Subject | None, exam: Exam) -> Finding:
    if drafter is None:
        return Finding.unknown(ACCEPTANCE, f"not measured: {refusal}")
    exam.say("drafting the target's answers")
    try:
        own = exam.decode(drafter)
        before = exam.decode(drafter_of(trained.name, trained.exits)) if trained is not None else None
    except ValueError as problem:
        return Finding.unknown(ACCEPTANCE, f"not measured: {problem}")
    return check_acceptance(own, before)
