"""`draftsmith data`: how files are read and rendered, to check before training or measuring."""

from __future__ import annotations

import json as json_module
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from draftsmith.infer.text.records import OnBad, ReadReport, Record, read_records
from draftsmith.infer.text.templates import Rendered, Template, find_template, load_tokenizer, render_record
from draftsmith.recipes.cli.ranges import IntFrom0, IntFrom1

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

# Records whose token lengths are measured: enough for quantiles, and quick.
RENDERED = 1000


@dataclass(slots=True)
class Lengths:
    """Sizes of records and texts, by name."""

    numbers: dict[str, list[int]] = field(default_factory=dict)

    def add(self, name: str, *values: int) -> None:
        if values:
            self.numbers.setdefault(name, []).extend(values)

    def add_record(self, record: Record) -> None:
        self.add("turns", *filter(None, [max(len(record.questions), len(record.answers))]))
        self.add("prompt characters", *map(len, record.questions))
        self.add("answer characters", *map(len, record.answers))
        self.add("document characters", *map(len, record.documents))
        self.add("token ids given", *filter(None, [len(record.token_ids)]))

    def summary(self) -> dict[str, dict[str, float]]:
        return {name: _quantiles(values) for name, values in self.numbers.items()}


def data(
    data: list[str],
    tokenizer: str | None = None,
    template: str = "auto",
    template_kwargs: dict[str, Any] | None = None,
    show: IntFrom0 = 1,
    limit: IntFrom1 | None = None,
    on_bad: OnBad = "skip",
    json: bool = False,
) -> None:
    """Show how files, folders or data sets are read: rows used and skipped, lengths, a rendered conversation.

    Example: draftsmith data logs.jsonl --tokenizer MODEL

    Args:
        data: files, folders, or data sets on the Hub (owner/name[:split]).
        tokenizer: folder or Hub name of a tokenizer, to show token lengths and rendered conversations.
        template: how conversations are rendered: auto (chat, or plain without one), chat (the tokenizer's own), plain,
            a format such as 'USER: {prompt} ASSISTANT:', or a FastChat name (vicuna_v1.1).
        template_kwargs: arguments of the chat template (enable_thinking: false).
        show: number of rendered conversations to show.
        limit: read at most this many records.
        on_bad: rows that are not valid JSON or UTF-8: skip and count them, or raise an error.
        json: print one JSON object on the last line.
    """
    from rich.console import Console

    served = None if tokenizer is None else find_template(template, load_tokenizer(tokenizer), template_kwargs)
    console = Console(highlight=False, soft_wrap=True)
    report, lengths, shown, refused = ReadReport(), Lengths(), 0, Counter[str]()
    for record in read_records(data, limit=limit, on_bad=on_bad, report=report):
        lengths.add_record(record)
        if served is None or report.used > max(RENDERED, show):
            continue
        for sample in _render(served, record, refused):
            lengths.add("tokens given", sample.loss_mask.count(0))
            lengths.add("tokens to learn", sample.loss_mask.count(1))
            if shown < show:
                shown += 1
                _show(console, served.tokenizer, record, sample)
    _print(console, report, lengths, refused)
    if json:
        used = {} if served is None else {"template": served.name}
        print(json_module.dumps({**report.to_json(), "lengths": lengths.summary(), "not_rendered": refused} | used))


def _render(template: Template, record: Record, refused: Counter[str]) -> Iterator[Rendered]:
    """The record's samples; a question without an answer gives its first prompt."""
    try:
        if record.answers or record.documents or record.token_ids:
            yield from render_record(template, record)
        else:
            prompt = template.prompt_ids(record.prompt)
            yield Rendered(prompt, [0] * len(prompt))
    except ValueError as error:
        refused[str(error)] += 1


def _show(console: Console, tokenizer: PreTrainedTokenizerBase, record: Record, sample: Rendered) -> None:
    console.print(f"{record.id}: row {record.row} of {record.source}", markup=False)
    console.print(_masked(tokenizer, sample, coloured=console.is_terminal and not console.no_color))
    console.rule()


def _masked(tokenizer: PreTrainedTokenizerBase, sample: Rendered, coloured: bool) -> Text:
    """The text of a sample; trained tokens are green, or between «» without colours."""
    from rich.text import Text

    text, mask, start, done = Text(), sample.loss_mask, 0, ""
    for end in range(1, len(mask) + 1):
        if end < len(mask) and mask[end] == mask[start]:
            continue
        whole = str(tokenizer.decode(sample.token_ids[:end], skip_special_tokens=False))
        part, done = whole[len(done) :], whole
        if mask[start] and not coloured:
            part = f"«{part}»"
        text.append(part, style="bold green" if mask[start] else "dim")
        start = end
    return text


def _print(console: Console, report: ReadReport, lengths: Lengths, refused: Counter[str]) -> None:
    from rich.table import Column, Table

    for line in report.lines():
        console.print(line, markup=False)
    for reason, count in refused.items():
        console.print(f"not rendered: {count} x {reason}", markup=False)
    for title, counts in (("kinds", report.kinds), ("categories", report.categories)):
        named = ", ".join(f"{name or '(none)'} {count}" for name, count in counts.most_common())
        console.print(f"{title}: {named}", markup=False)
    columns = (Column(name, justify="right") for name in ("count", "total", "median", "95 %", "longest"))
    table = Table("length", *columns)
    for name, numbers in lengths.summary().items():
        table.add_row(name, *(f"{number:,.0f}" for number in numbers.values()))
    console.print(table)
    if "tokens given" in lengths.numbers and report.used > RENDERED:
        console.print(f"token lengths are those of the first {RENDERED} records")


def _quantiles(values: Sequence[int]) -> dict[str, float]:
    p95 = statistics.quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]
    middle = statistics.median(values)
    return {"count": len(values), "total": sum(values), "median": middle, "p95": p95, "longest": max(values)}
