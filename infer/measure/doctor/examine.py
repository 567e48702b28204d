"""Which checks a folder or Hub name gets: those of a head, of a draft model, or of a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from draftsmith.infer.heads.folders import Kind, kind_of
from draftsmith.infer.heads.head_files import HeadFiles
from draftsmith.infer.measure.doctor.draft import examine_draft
from draftsmith.infer.measure.doctor.exam import Exam
from draftsmith.infer.measure.doctor.finding import Finding
from draftsmith.infer.measure.doctor.head import examine_head
from draftsmith.infer.measure.doctor.target import examine_target
from draftsmith.infer.models.load import check_model, choose_device, load_target
from draftsmith.infer.text.record import Record
from draftsmith.infer.text.templates import find_template


@dataclass(frozen=True, slots=True)
class CheckRequest:
    """`target` "": the draft is a target itself. `exits`: of a sorted draft whose config does not name them."""

    draft: str
    target: str = ""
    reference: str = ""
    exits: Sequence[int] = ()
    template: str = "auto"
    max_new_tokens: int = 48
    batch_size: int = 8
    dtype: str = "auto"
    device: str = "auto"


def check_request(asked: CheckRequest) -> Kind | None:
    """What kind of head the draft is, None for a model; ValueError for what nothing can be checked of."""
    for name in filter(None, (asked.draft, asked.target, asked.reference)):
        check_model(name, asked.dtype, asked.device)
    kind = head_of(asked.draft)
    if not asked.target and (kind or asked.reference or asked.exits):
        why = f"{asked.draft} holds {kind} heads" if kind else "--reference and --exits are for drafts"
        raise ValueError(f"{why}: give the --target that it drafts for")
    if asked.reference and head_of(asked.reference) != kind:
        raise ValueError(f"--reference {asked.reference} is another kind of draft than {asked.draft}")
    if kind and asked.exits:
        raise ValueError(f"{asked.draft} holds {kind} heads, which have no exits: leave --exits out")
    return kind


def head_of(name: str) -> Kind | None:
    """The kind of head in a folder, or on the Hub."""
    folder = Path(name).expanduser()
    return kind_of(folder if folder.is_dir() else HeadFiles.open(name).folder)


def examine(asked: CheckRequest, records: Sequence[Record], say: Callable[[str], None]) -> list[Finding]:
    """The findings, in order; ValueError for a target or a reference that cannot be used."""
    kind = check_request(asked)
    if not asked.target:
        device = choose_device(asked.device)
        return examine_target(asked.draft, records, asked.template, asked.max_new_tokens, asked.dtype, device, say)
    target = load_target(asked.target, dtype=asked.dtype, device=asked.device)
    assert target.tokenizer is not None
    template = find_template(asked.template, target.tokenizer, notice=lambda line: None)
    exam = Exam.sit(target, asked.target, template, records, asked.max_new_tokens, asked.batch_size, say)
    if kind:
        return examine_head(asked.draft, kind, exam, asked.reference or None)
    return examine_draft(asked.draft, exam, asked.reference or None, asked.exits)
