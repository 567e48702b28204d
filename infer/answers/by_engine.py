"""A target's own answers to prompts, decoded by the engine: the in-distribution corpus for drafts and stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from draftsmith.infer.answers.answer_file import AnswerFile, Conversation, KeyedRecord
from draftsmith.infer.contract.protocols import Drafter, Rule, Target
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.engine.logprobs import NotingRule
from draftsmith.infer.text.rendering import Template


def answer_all(
    target: Target,
    drafter: Drafter,
    records: Sequence[KeyedRecord],
    template: Template,
    settings: Settings,
    stops: Stops,
    out: AnswerFile,
    *,
    batch_size: int = 8,
    logprobs: bool = False,
    rule: str | Rule | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Answer every turn of the records that `out` lacks. `drafter` is bound already.

    An error of one turn (a prompt that does not fit the target's context, say) ends its record, and no other.

    `logprobs`: keep those of the tokens, after temperature and truncation.
    `progress(records, tokens)`, of this call, is called after every record.
    """
    noting = NotingRule(rule)
    missing = iter(out.missing(records))
    ended = tokens = 0
    open_now: dict[Row, tuple[str, Conversation]] = {}

    def ask(key: str, conversation: Conversation) -> None:
        messages, turn = conversation.ask(), len(conversation.stops)
        try:
            ids = template.prompt_ids(messages)
            if len(ids) >= target.max_positions:
                end_of_context = f"the target's context ends at {target.max_positions}"
                raise ValueError(f"the prompt has {len(ids)} tokens, but {end_of_context}")
            row = engine.add(Row(f"{key}/{turn}", ids, settings, stops, target.tokenizer))
        except ValueError as problem:
            end(key, conversation, str(problem))
        else:
            open_now[row] = key, conversation

    def end(key: str, conversation: Conversation, error: str = "") -> None:
        nonlocal ended
        out.write(key, conversation.row(error))
        ended += 1
        if progress is not None:
            progress(ended, tokens)

    def take(row: Row, done: Generation) -> None:
        nonlocal tokens
        key, conversation = open_now.pop(row)
        tokens += len(done.token_ids)
        if done.error:
            end(key, conversation, done.error)
            return
        noted = noting.take(row.key, row.prompt_tokens, len(done.token_ids)) if logprobs else None
        conversation.take(done.text, done.stop, row.ids[: row.prompt_tokens], done.token_ids, noted)
        if conversation.finished:
            end(key, conversation)
        else:
            ask(key, conversation)

    with Engine(target, drafter, batch_size=batch_size, rule=noting if logprobs else rule) as engine:
        while True:
            # One batch waits behind the one that decodes; the other prompts are not rendered yet.
            while len(open_now) < 2 * batch_size and (one := next(missing, None)) is not None:
                ask(one.key, Conversation(one.record, settings))
            if not open_now:
                return
            for event in engine.step():
                if event.done is not None:
                    take(event.row, event.done)
