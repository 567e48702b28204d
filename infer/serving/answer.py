"""One request being answered: its rows in the engine, and their text as it comes out, in the server's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from draftsmith.infer.contract.row import Row
from draftsmith.infer.serving.engine_thread import EngineThread, RowNews, Ticket
from draftsmith.infer.serving.noted_logprobs import TokenLogprobs
from draftsmith.infer.serving.text_stream import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class NewText:
    """New text of the answer `index`, with the log-probabilities of its tokens and where in the text each begins.

    `tokens`: those that were committed since the last piece. `finish`: OpenAI's finish_reason, empty if it goes on.
    """

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish: str = ""

    def add(self, other: NewText) -> None:
        self.text += other.text
        self.tokens += other.tokens
        self.logprobs += other.logprobs
        self.offsets += other.offsets
        self.finish = other.finish


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the prompts, of these in the cache, and of the answers."""

    prompt: int
    cached: int
    completion: int

    def to_json(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class PendingAnswer:
    """The answer to a request of `rows`, `samples` for each prompt. `submit` it, and `cancel` it in any case."""

    def __init__(
        self,
        thread: EngineThread,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        samples: int,
        top_logprobs: int | None = None,
    ) -> None:
        self._thread = thread
        self._samples = samples
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[int, RowNews]] = asyncio.Queue()
        self._tickets = [Ticket(row, partial(self._from_thread, index), top_logprobs) for index, row in enumerate(rows)]
        self._texts = [TextStream(tokenizer, row.stops.strings) for row in rows]
        self._unshown: list[list[TokenLogprobs]] = [[] for _ in rows]
        self._left = set(range(len(rows)))
        self.completion_tokens = 0

    @property
    def prompts(self) -> list[list[int]]:
        """The token ids of each prompt."""
        return [ticket.row.ids[: ticket.row.prompt_tokens] for ticket in self._tickets[:: self._samples]]

    @property
    def usage(self) -> Usage:
        first = self._tickets[:: self._samples]
        prompt = sum(ticket.row.prompt_tokens for ticket in first)
        return Usage(prompt, sum(ticket.cached for ticket in first), self.completion_tokens)

    def submit(self) -> None:
        self._thread.submit(self._tickets)

    def cancel(self) -> None:
        """Let the rows leave that have not ended."""
        if self._left:
            self._thread.cancel([self._tickets[index] for index in self._left])

    async def pieces(self) -> AsyncIterator[NewText]:
        """What the rows commit, as it comes, to the end of all; ApiError if one of them fails."""
        while self._left:
            index, news = await self._news.get()
            if news.last:
                self._left.discard(index)
            if news.error is not None:
                raise news.error
            self.completion_tokens += len(news.tokens)
            yield self._piece(index, news)

    async def whole(self) -> list[NewText]:
        """All answers, in order."""
        found = [NewText(index) for index in range(len(self._tickets))]
        async for piece in self.pieces():
            found[piece.index].add(piece)
        return found

    def _piece(self, index: int, news: RowNews) -> NewText:
        stream, unshown = self._texts[index], self._unshown[index]
        text = stream.add(news.tokens, news.stop)
        unshown += news.logprobs
        # The entries of tokens whose text is shown: not of a stop token, nor of what a stop string cuts off.
        offsets = stream.offsets[len(stream.offsets) - len(unshown) :]
        shown = next((i for i, offset in enumerate(offsets) if offset >= stream.given), len(offsets))
        logprobs, unshown[:] = unshown[:shown], unshown[shown:]
        return NewText(index, text, news.tokens, logprobs, offsets[:shown], finish_reason(news.stop))

    def _from_thread(self, index: int, news: RowNews) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._news.put_nowait, (index, news))


def finish_reason(stop: str) -> str:
    """OpenAI's word for why a row ended."""
    if not stop:
        return ""
    return "length" if stop in ("max_new_tokens", "context") else "stop"
