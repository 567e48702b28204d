"""`draftsmith replay`: drafters against recorded answers. Does it help *my* logs? No target is needed."""

from __future__ import annotations

import sys
from json import dumps
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from draftsmith.infer.rendering import Template


def replay(
    *,
    data: list[str],
    tokenizer: str,
    drafters: str,
    template: str = "auto",
    temperature: float = 0.0,
    nodes: int = 64,
    depth: int = 64,
    limit: int | None = None,
    on_bad: str = "raise",
    seed: int = 0,
    json: bool = False,
) -> None:
    """Replay recorded answers and print how much of them each drafter would have drafted.

    Example: draftsmith replay --data logs.jsonl --tokenizer DIR --drafters pld

    Args:
        data: files, folders or `datasets` names with answers; token ids are used as they are.
        tokenizer: folder or Hub name of the target's tokenizer.
        drafters: comma-separated, such as pld,rest:STORE,small:MODEL.
        template: how a conversation was served: auto (the tokenizer's chat template where it has one), chat, plain, a
            format with {prompt}, or a FastChat name.
        temperature: that the answers were sampled at; above 0 only outright drafts can be replayed.
        nodes: the most nodes of a draft.
        depth: the deepest that a draft may go.
        limit: so many records and no more.
        on_bad: rows that cannot be read: raise, or skip and count them.
        seed: of the intervals.
        json: print one JSON object on the last line.
    """
    from draftsmith.infer.contract import Budget
    from draftsmith.infer.measure import tables
    from draftsmith.infer.measure.replay import recordings
    from draftsmith.infer.measure.replay import replay as run
    from draftsmith.infer.records import ReadReport, read_records
    from draftsmith.infer.templates import load_tokenizer
    from draftsmith.recipes.drafters import parse_drafters

    chosen = parse_drafters(drafters)
    if not chosen:
        raise ValueError("give --drafters, such as pld or rest:STORE")
    if on_bad not in ("raise", "skip"):
        raise ValueError(f"--on_bad is raise or skip, not {on_bad!r}")
    loaded = load_tokenizer(tokenizer)
    report = ReadReport()
    records = read_records(data, limit=limit, need="answers", on_bad=on_bad, report=report)  # type: ignore[arg-type]
    streams = recordings(records, _template(template, loaded))
    results = run(
        chosen,
        streams,
        len(loaded),
        loaded,
        temperature=temperature,
        budget=Budget(nodes, depth),
        seed=seed,
        progress=_progress,
    )
    if json:
        print(dumps(results, ensure_ascii=False))
        return
    for line in report.lines():
        print(line)
    tables.show(tables.replay_tables(results))


def _template(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    from draftsmith.infer.templates import find_template

    if name == "auto":
        name = "chat" if tokenizer.chat_template else "USER: {prompt} ASSISTANT:"
        print(f"conversations are rendered with {name!r}", file=sys.stderr)
    return find_template(name, tokenizer)


def _progress(done: int, total: int, name: str) -> None:
    if done == total or done % 20 == 0:
        print(f"\r{name}: {done}/{total}\x1b[K", end="\n" if done == total else "", file=sys.stderr, flush=True)
