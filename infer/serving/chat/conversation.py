"""Conversations, turn by turn: `LocalConversation` has an engine of its own, whose cache is kept between turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from draftsmith.infer.contract.draft import Draft
from draftsmith.infer.contract.protocols import Drafter, Rule, Target, TargetDistribution, Verdict
from draftsmith.infer.contract.rng import StepRng
from draftsmith.infer.contract.row import Row
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.engine.prompts import rows_of
from draftsmith.infer.rules.named import as_rule
from draftsmith.infer.serving.text_stream import TextStream
from draftsmith.infer.text.record import Message
from draftsmith.infer.text.rendering import Template

TARGET = "target"


@dataclass(frozen=True, slots=True)
class SaidText:
    """A part of an answer, and the source of its token: a drafter's, or `target`."""

    text: str
    source: str = ""


class TurnByTurn(Protocol):
    """A conversation so far, and how it goes on. `system`: the system message; empty for none."""

    messages: list[Message]
    system: str

    def ask(self, text: str) -> Iterator[SaidText]:
        """The answer as it comes. Closing the iterator, or an interrupt, ends it; what was said by then stays."""
        ...

    def stats(self) -> str:
        """About the last answer, in one line."""
        ...

    def reset(self) -> None:
        """Forget all turns."""
        ...


class SourcesRule:
    """A verification rule, and the sources of the tokens that it committed last."""

    def __init__(self, rule: str | Rule | None = None) -> None:
        self.rule = as_rule(rule)
        self.sources: list[str] = []

    def __call__(self, draft: Draft, distribution: TargetDistribution, rng: StepRng) -> Verdict:
        verdict = self.rule(draft, distribution, rng)
        self.sources = [*(trial.source for trial in verdict.accepted), TARGET]
        return verdict


class LocalConversation:
    """With `target`, drafted for by `drafter`, which is bound to it.

    `fields`: max_new_tokens, temperature, ..., as of `Engine.generate`.
    """

    def __init__(
        self, target: Target, drafter: Drafter, template: Template, rule: str | Rule | None = None, **fields: Any
    ) -> None:
        self.messages: list[Message] = []
        self.system = ""
        self.target, self.template, self.fields = target, template, fields
        self._rule = SourcesRule(rule)
        self._engine = Engine(target, drafter, rule=self._rule)
        self._row: Row | None = None
        self._leaving: Row | None = None
        self._done: Generation | None = None

    def use(self, drafter: Drafter) -> None:
        """Draft with another drafter from now on; it reads the conversation anew."""
        self._engine.close()
        self._engine, self._row, self._leaving = Engine(self.target, drafter, rule=self._rule), None, None

    def reset(self) -> None:
        self._engine.close()
        self.messages, self._row, self._leaving, self._done = [], None, None, None

    def ask(self, text: str) -> Iterator[SaidText]:
        messages = [*self.messages, Message("user", text)]
        head = [Message("system", self.system)] if self.system else []
        row = self._begin(self.template.prompt_ids([*head, *messages]))
        assert self.target.tokenizer is not None
        stream, answer = TextStream(self.target.tokenizer, row.stops.strings), ""
        self.messages = messages
        try:
            for tokens, stop in self._rounds(row):
                ends = [""] * (len(tokens) - 1) + [stop]
                sources = self._rule.sources[: len(tokens)] + [TARGET] * (len(tokens) - len(self._rule.sources))
                for token, end, source in zip(tokens, ends, sources):
                    said = stream.add([token], end)
                    answer += said
                    if said:
                        yield SaidText(said, source)
        finally:
            if not row.stop:
                # A stop of ours: the engine reports the row as ended, and keeps its cache.
                row.stop = "interrupted"
                for tokens, stop in self._rounds(row):
                    answer += stream.add(tokens, stop)
            self.messages.append(Message("assistant", answer))

    def stats(self) -> str:
        done = self._done
        if done is None:
            return "nothing was said yet"
        seconds = sum(trace.seconds for trace in done.traces)
        committed = sum(trace.committed for trace in done.traces)
        speed = f"{committed / seconds:.1f} tokens/s" if seconds else "- tokens/s"
        length = f"{committed / len(done.traces):.2f}" if done.traces else "-"
        return (
            f"{len(done.token_ids)} tokens, {speed}, first after {done.first_s:.2f} s; drafter "
            f"{self._engine.drafter.name}, accepted_length {length}; {done.prompt_tokens} tokens of context"
        )

    def _begin(self, ids: Sequence[int]) -> Row:
        """The row of this turn: the last one, continued, if the prompt begins with all that it holds."""
        (made,) = rows_of(self.target, [("0", ids)], **self.fields)
        old = self._row
        if old is not None and list(ids[: len(old.ids)]) == old.ids and len(ids) > len(old.ids):
            return self._engine.resume(old, ids[len(old.ids) :], made.stops)
        self._engine.add(made, keep=True)
        self._row, self._leaving = made, old
        return made

    def _rounds(self, row: Row) -> Iterator[tuple[list[int], str]]:
        """Tokens of each round, and why the row stopped after them."""
        while row in self._engine:
            events = self._engine.step()
            if self._leaving is not None:  # the new row shares by now what both begin with
                self._engine.abort(self._leaving)
                self._leaving = None
            for event in events:
                if event.problem is not None:
                    self._row = None
                    raise event.problem
                if event.done is not None:
                    self._done = event.done
                if event.tokens or event.done is not None:
                    yield event.tokens, row.stop
                if event.done is not None:
                    return
