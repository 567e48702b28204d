"""A target's own answers to prompts, from an OpenAI-compatible server: concurrent requests, with retries.

Token ids are the server's own if it returns them (vLLM does on request), otherwise its text under the given tokenizer;
the row's `token_ids_from` says which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from draftsmith.infer.answers.answer_file import AnswerFile, Conversation, KeyedRecord
from draftsmith.infer.answers.server_client import RefusedError, Server
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.text.record import Message, Record
from draftsmith.infer.text.rendering import Template, last_answer


def answer_through(
    server: Server,
    records: Sequence[KeyedRecord],
    template: Template,
    settings: Settings,
    max_new_tokens: int,
    out: AnswerFile,
    *,
    concurrency: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Answer the records that `out` lacks, `concurrency` at a time; `progress(rows, tokens)`, of this call, after every
    row.

    A prompt that does not fit the server's context is its row's error; any other refusal ends the run.
    """
    for one in records:
        if name := template.rendered_format(one.record.prompt):
            raise ValueError(
                f"{one.record.source} row {one.record.row}: the prompt is already rendered ({name}), and a server "
                "wraps every prompt in its own template: give prompts without one, or answer with --target"
            )
    waiting = iter(out.missing(records))
    rows = tokens = 0
    with ThreadPoolExecutor(concurrency) as pool:

        def begin() -> dict[Future[dict[str, Any]], str]:
            one = next(waiting, None)
            if one is None:
                return {}
            return {pool.submit(_answer, server, one.record, template, settings, max_new_tokens): one.key}

        running: dict[Future[dict[str, Any]], str] = {}
        for _ in range(concurrency):
            running |= begin()
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    key, row = running.pop(future), future.result()
                    out.write(key, row)
                    tokens += sum(map(len, row.get("token_ids_by_turn", [row.get("token_ids", [])])))
                    rows += 1
                    if progress is not None:
                        progress(rows, tokens)
                    running |= begin()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _answer(
    server: Server, record: Record, template: Template, settings: Settings, max_new_tokens: int
) -> dict[str, Any]:
    """The row of a record. A turn that does not fit the server's context ends it, with the answers before."""
    conversation, own = Conversation(record, settings), True
    while not conversation.finished:
        messages = conversation.ask()
        try:
            answer = server.chat(messages, settings, max_new_tokens)
        except RefusedError as problem:
            if not problem.beyond_context:
                raise
            answered = {"token_ids_from": "server" if own else "text"} if conversation.stops else {}
            return conversation.row(str(problem)) | answered
        text, stop, token_ids = answer["text"], answer["stop"], answer["token_ids"]
        prompt = answer["prompt_token_ids"] or template.prompt_ids(messages)
        own = own and bool(token_ids)
        conversation.take(
            text, stop, prompt, token_ids or _ids_of_text(template, [*messages, Message("assistant", text)], stop)
        )
    return conversation.row() | {"token_ids_from": "server" if own else "text"}


def _ids_of_text(template: Template, messages: Sequence[Message], stop: str) -> list[int]:
    """The ids of the last answer, without an end token if it was cut at its length limit."""
    _, ids = last_answer(template, messages)
    ended = bool(ids) and not template.tokenizer.decode(ids[-1:], skip_special_tokens=True)
    return ids[:-1] if ended and stop == "length" else ids
