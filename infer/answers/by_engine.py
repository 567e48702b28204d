"""A target's own answers to prompts, decoded by the engine: the in-distribution corpus for drafts and stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from draftsmith.infer.answers.answer_file import AnswerFile, Conversation, KeyedRecord
from draftsmith.infer.contract.protocols import Drafter, Target
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.text.rendering import Template

CHUNK = 8


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
    progress: Callable[[int, int, int], None] | None = None,
) -> None:
    """Answer every turn of the records that `out` lacks. `drafter` is bound already.

    A prompt that does not fit the target's context ends its record with an error, and no other.

    `progress(done, total, tokens)` is called after every row.
    """
    missing = out.missing(records)
    tokens = 0
    open_now: dict[str, Conversation] = {}
    prompts: dict[str, list[int]] = {}

    def done(generation: Generation) -> None:
        nonlocal tokens
        key = generation.row.rpartition("/")[0]
        conversation = open_now[key]
        conversation.take(generation.text, generation.stop, prompts[key], generation.token_ids)
        tokens += len(generation.token_ids)
        if conversation.finished:
            end(key)

    def end(key: str, error: str = "") -> None:
        out.write(key, open_now.pop(key).row(error))
        if progress is not None:
            progress(len(out.done), len(records), tokens)

    for at in range(0, len(missing), batch_size * CHUNK):
        open_now = {one.key: Conversation(one.record) for one in missing[at : at + batch_size * CHUNK]}
        while open_now:
            prompts = {key: template.prompt_ids(conversation.ask()) for key, conversation in open_now.items()}
            for key in [key for key, prompt in prompts.items() if len(prompt) >= target.max_positions]:
                length = len(prompts.pop(key))
                end(key, f"the prompt has {length} tokens, but the target's context ends at {target.max_positions}")
            rows = [
                Row(f"{key}/{len(open_now[key].stops)}", prompt, settings, stops, target.tokenizer)
                for key, prompt in prompts.items()
            ]
            generate(target, drafter, rows, batch_size=batch_size, on_done=done)
