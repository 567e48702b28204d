"""Is a head (EAGLE, Medusa, Hydra) what it should be for its target?"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch

from draftsmith.infer.drafters.heads.eagle import Eagle
from draftsmith.infer.drafters.heads.hydra import Hydra
from draftsmith.infer.drafters.heads.medusa import Medusa
from draftsmith.infer.drafters.heads.pair_head import lend
from draftsmith.infer.heads.eagle import EagleHead
from draftsmith.infer.heads.eagle_folder import LAYER_IDS
from draftsmith.infer.heads.folders import Kind, TrainedFor, load_eagle, load_hydra, load_medusa, trained_for
from draftsmith.infer.heads.head_files import HeadFiles
from draftsmith.infer.heads.hydra import HydraHeads
from draftsmith.infer.heads.medusa import MedusaHeads
from draftsmith.infer.measure.doctor import rotary, weights
from draftsmith.infer.measure.doctor.acceptance import CHECK as ACCEPTANCE
from draftsmith.infer.measure.doctor.acceptance import check_acceptance
from draftsmith.infer.measure.doctor.exam import Exam, gain, head_losses
from draftsmith.infer.measure.doctor.finding import Finding
from draftsmith.infer.measure.doctor.weights import Mend, MendTried, best_of
from draftsmith.infer.models.layers import find_parts
from draftsmith.infer.models.runner.taps import Taps
from draftsmith.infer.text.tokenizer import tokenizer_fingerprint

LOAD: dict[Kind, Callable[..., Any]] = {"eagle": load_eagle, "medusa": load_medusa, "hydra": load_hydra}
DRAFTERS: dict[Kind, Callable[..., Any]] = {"eagle": Eagle, "medusa": Medusa, "hydra": Hydra}
CHAIN: dict[str, Any] = {"top_k": 1, "min_confidence": 0.0, "calibration": "none", "costs": "none"}
VOCABULARY, LAYERS, TARGET = "draft vocabulary", "layers read", "target"
# By what a reader's refusal names, the check that it belongs to.
ABOUT = {"d2t": VOCABULARY, LAYER_IDS: LAYERS}
MENDS = {
    VOCABULARY: "write d2t (the target's id less the draft's, for each draft id) into the weights: its trainer has it",
    LAYERS: 'write the states that it was trained on as "features" into draftsmith.json, such as ["layer:2"]',
    TARGET: "use it with the target that it was trained for, or train one for this target",
    "files": "export or copy it again",
}
# Mends a suspected fault in memory, and measures: (suspected, its mend, the mend in memory).
Tried: TypeAlias = Callable[[str, str, Mend], MendTried]
# A draft vocabulary that holds less of the target's answers than this is another one.
COVERED = 0.5


@dataclass(frozen=True, slots=True)
class HeadSubject:
    """A head as its folder holds it, in the target's dtype."""

    name: str
    kind: Kind
    files: HeadFiles
    head: Any

    @classmethod
    def read(cls, name: str, kind: Kind, exam: Exam) -> HeadSubject:
        model = exam.model
        head = LOAD[kind](name, model.config)
        return cls(name, kind, HeadFiles.open(name), head.to(model.get_input_embeddings().weight))


def examine_head(name: str, kind: Kind, exam: Exam, reference: str | None = None) -> list[Finding]:
    """The findings on a head, in order. A reader's refusal is one of them, and what needs no loaded head goes on."""
    trained = HeadSubject.read(reference, kind, exam) if reference is not None else None
    files = HeadFiles.open(name)
    origin = trained_for(name) or TrainedFor()
    stored = list(files.read(files.shapes).items())
    run_in = exam.model.dtype
    try:
        with noted() as assumed:
            subject = HeadSubject.read(name, kind, exam)
    except ValueError as problem:
        refused = _refused(name, kind, str(problem))
        rest = [] if refused.check == TARGET else [_target(origin, exam)]
        dtype = weights.check_dtype(stored, run_in, None)
        unmeasured = Finding.unknown(ACCEPTANCE, "not measured: the head cannot be loaded")
        return [refused, *rest, _tokenizer(origin, exam), dtype, unmeasured]
    found = [Finding.ok("files", _described(subject)), _target(origin, exam), _tokenizer(origin, exam)]
    found += [Finding.unknown("assumed", one.removeprefix(f"{name}: ")) for one in assumed]
    found.append(weights.check_dtype(stored, run_in, lambda: _finite(subject, exam)))
    if kind == "eagle":
        exam.say("trying what may be wrong with the head")
        found += _of_eagle(subject, trained, exam)
    if trained is not None:
        own, other = _others(subject), dict(trained.head.named_parameters())
        found.append(weights.check_equal(own, other, (1, 1)))
    found.append(_acceptance(subject, trained, exam))
    return found


def _refused(name: str, kind: Kind, problem: str) -> Finding:
    """The reader's refusal, by the check that it belongs to: what loads without the target is another target's."""
    about = next((check for word, check in ABOUT.items() if word in problem), "")
    if not about:
        about = "files"
        with contextlib.suppress(ValueError):
            LOAD[kind](name)
            about = TARGET
        if "another target" in problem:
            about = TARGET
    return Finding.wrong(about, problem, MENDS[about])


def _described(subject: HeadSubject) -> str:
    if isinstance(subject.head, EagleHead):
        return f"an EAGLE head of version {subject.head.design.version}, all weights are there"
    return f"{len(subject.head.heads)} {subject.kind.capitalize()} heads, all weights are there"


def _target(origin: TrainedFor, exam: Exam) -> Finding:
    if not origin.fingerprint:
        return Finding.unknown(TARGET, "it does not say whose states it was trained on; the shapes fit this target's")
    if origin.fingerprint == exam.target.fingerprint():
        return Finding.ok(TARGET, "trained on this target's states: the weights' fingerprints agree")
    if exam.model.dtype == torch.float16:
        return Finding.unknown(TARGET, "the weights' fingerprints differ, which may be float16's rounding")
    named = f" ({origin.name})" if origin.name else ""
    return Finding.wrong(TARGET, f"trained on the states of a target with other weights{named}", MENDS[TARGET])


def _tokenizer(origin: TrainedFor, exam: Exam) -> Finding:
    if not origin.tokenizer or exam.target.tokenizer is None:
        return Finding.unknown("tokenizer", "it does not say which one it was trained with")
    if origin.tokenizer == tokenizer_fingerprint(exam.target.tokenizer):
        return Finding.ok("tokenizer", "trained with the target's")
    return Finding.wrong("tokenizer", "trained with another one: its ids mean other text", MENDS[TARGET])


@contextlib.contextmanager
def noted() -> Iterator[list[str]]:
    """What readers of heads log inside: assumptions about what a folder does not say. It is not printed."""
    found: list[str] = []
    logger, handler = logging.getLogger("draftsmith.infer.heads"), logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


@torch.inference_mode()
def _finite(subject: HeadSubject, exam: Exam) -> bool:
    """Whether the head's logits over an answer of the target are numbers."""
    head, model, one = subject.head, exam.model, exam.answers[0]
    embedding = model.get_input_embeddings()
    ids_T = torch.tensor([*one.prompt, *one.answer], device=embedding.weight.device)
    taps = Taps(model)
    with taps.taking(list(head.features)) as taken:
        model(ids_T[None], use_cache=False)
    states = {name: taken[name][0, :-1] for name in head.features}
    if isinstance(head, MedusaHeads):
        logits = head(states["last"])
    elif isinstance(head, HydraHeads):
        logits = head.logits(0, states["last"], [embedding(ids_T[1:])])
    else:
        lend(subject.name, head, model)
        count = len(ids_T) - 1
        mask = torch.full((count, count), torch.finfo(exam.model.dtype).min, device=ids_T.device).triu(1)
        logits = head(
            inputs_embeds=head.pairs(ids_T[1:], head.joined(states))[None],
            position_ids=torch.arange(count, device=ids_T.device)[None],
            attention_mask=mask[None, None].to(exam.model.dtype),
        ).logits
    return bool(logits.isfinite().all())


def _of_eagle(subject: HeadSubject, trained: HeadSubject | None, exam: Exam) -> list[Finding]:
    head = subject.head
    before = trained.head if trained is not None else None
    try:
        losses_N = head_losses(Eagle(head, **CHAIN), exam)
    except ValueError as problem:
        return [Finding.unknown(LAYERS, f"not tried: {problem}")]

    guessing = math.log(head.config.vocab_size)

    def tried(suspected: str, mend: str, mended: Mend) -> MendTried:
        with mended():
            return MendTried(suspected, gain(losses_N, head_losses(Eagle(head, **CHAIN), exam), guessing), mend)

    target = exam.model.config.get_text_config()
    trials: dict[str, list[MendTried]] = {LAYERS: [], VOCABULARY: [], rotary.CHECK: []}
    if before is None:
        trials[LAYERS] = _layer_trials(head, target.num_hidden_layers, tried)
        trials[VOCABULARY] = _vocabulary_trials(head, exam.target.vocab_size, tried)
        trials[rotary.CHECK] = [tried(*one) for one in rotary.suspects(head, head.config, [])]
    trials = weights.likeliest(trials)
    return [
        _layers(head, before, trials[LAYERS]),
        _vocabulary(head, before, trials[VOCABULARY], losses_N, exam),
        rotary.check_rotary(head, head.config, before, target, trials[rotary.CHECK]),
        *_tables(head, before, exam),
    ]


def _layer_trials(head: EagleHead, layers: int, tried: Tried) -> list[MendTried]:
    found = []
    for step in (1, -1):
        moved = tuple(_moved(name, step, layers) for name in head.features)
        if moved != head.features:
            what = f"it reads {_listed(head.features)}, where {_listed(moved)} fit"
            mend = f'write "features": {list(moved)} into draftsmith.json'.replace("'", '"')
            found.append(tried(what, mend, partial(reading, head, moved)))
    return found


def _layers(head: EagleHead, trained: EagleHead | None, trials: Sequence[MendTried]) -> Finding:
    if trained is not None and head.features != trained.features:
        return Finding.wrong(
            LAYERS,
            f"{_listed(head.features)}, and the reference reads {_listed(trained.features)}",
            "copy the reference's draftsmith.json and config.json",
        )
    trial = best_of(trials)
    return trial.finding(LAYERS) if trial is not None else Finding.ok(LAYERS, _listed(head.features))


@contextlib.contextmanager
def reading(head: EagleHead, features: tuple[str, ...]) -> Iterator[None]:
    """Inside, the head reads other states."""
    before = head.design
    head.design = replace(before, features=features)
    try:
        yield
    finally:
        head.design = before


def _vocabulary_trials(head: EagleHead, vocab_size: int, tried: Tried) -> list[MendTried]:
    if head.ids_V is None:
        return []
    ways = {f"its ids are shifted by {-step:+d}": (head.ids_V + step) % vocab_size for step in (1, -1)}
    return [tried(what, MENDS[VOCABULARY], partial(drafting, head, ids_V)) for what, ids_V in ways.items()]


def _vocabulary(
    head: EagleHead, trained: EagleHead | None, trials: Sequence[MendTried], losses_N: torch.Tensor, exam: Exam
) -> Finding:
    """Whether its ids are the right tokens: the reference's, not shifted, and such as the target's answers have."""
    if head.ids_V is None:
        return Finding.ok(VOCABULARY, f"all {head.config.vocab_size} tokens")
    held = {*head.ids_V.tolist()}
    said = [token for one in exam.answers for token in one.answer]
    covered = sum(token in held for token in said) / max(len(said), 1)
    found = f"{len(held)} tokens, {covered:.0%} of the target's answers"
    if trained is not None and trained.ids_V is not None:
        if torch.equal(head.ids_V, trained.ids_V):
            return Finding.ok(VOCABULARY, f"{found}, the reference's")
        return Finding.wrong(VOCABULARY, f"{found}, and not the reference's", "copy d2t and t2d from the reference")
    if (trial := best_of(trials)) is not None:
        return trial.finding(VOCABULARY)
    if covered < COVERED:
        return Finding.wrong(VOCABULARY, found, MENDS[VOCABULARY])
    inside_N = torch.tensor([token in held for token in said])
    zeros = torch.equal(head.ids_V.cpu(), torch.arange(len(held)))
    if zeros and float(losses_N[inside_N].mean()) > math.log(len(held)):
        return Finding.wrong(
            VOCABULARY, f"d2t is all zeros, and the head predicts worse than guessing ({found})", MENDS[VOCABULARY]
        )
    return Finding.ok(VOCABULARY, found)


@contextlib.contextmanager
def drafting(head: EagleHead, ids_V: torch.Tensor) -> Iterator[None]:
    """Inside, the head's ids are other tokens."""
    before = head.ids_V
    head.ids_V = ids_V
    try:
        yield
    finally:
        head.ids_V = before


def _tables(head: Any, trained: Any | None, exam: Exam) -> list[Finding]:
    """Its own embedding and output head, where it has them."""
    output: Any = find_parts(exam.model).head.weight
    tables = {
        "embedding": (head.embed_tokens, trained and trained.embed_tokens, exam.model.get_input_embeddings().weight),
        "head": (head.lm_head, trained and trained.lm_head, output if head.ids_V is None else output[head.ids_V]),
    }
    tokens = len(exam.target.tokenizer or ())
    return [
        weights.check_table(check, own.weight, theirs, before.weight if before is not None else None, [], tokens)
        for check, (own, before, theirs) in tables.items()
        if own is not None
    ]


def _others(subject: HeadSubject) -> dict[str, torch.Tensor]:
    """The weights that no check of their own compares with the reference."""
    apart = {id(one.weight) for _, one in rotary.projections(subject.head)}
    if isinstance(subject.head, EagleHead):
        tables = (subject.head.embed_tokens, subject.head.lm_head)
        apart |= {id(one.weight) for one in tables if one is not None}
    return {name: one for name, one in subject.head.named_parameters() if id(one) not in apart}


def _acceptance(subject: HeadSubject, trained: HeadSubject | None, exam: Exam) -> Finding:
    exam.say("drafting the target's answers")
    make = DRAFTERS[subject.kind]
    try:
        own = exam.decode(make(subject.name, **CHAIN))
        before = exam.decode(make(trained.name, **CHAIN)) if trained is not None else None
    except ValueError as problem:
        return Finding.unknown(ACCEPTANCE, f"not measured: {problem}")
    return check_acceptance(own, before)


def _moved(name: str, step: int, layers: int) -> str:
    """`layer:k`, with k moved; the last state stays."""
    kind, _, number = name.partition(":")
    moved = int(number) + step if kind == "layer" else -1
    return f"layer:{moved}" if 0 <= moved <= layers else name


def _listed(features: Sequence[str]) -> str:
    return ", ".join(features)
