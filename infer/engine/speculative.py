"""Drafting inside transformers' own `generate`: `model.generate(**inputs, custom_generate=speculative("pld"))`.

`generate` prepares the call as ever (padding, generation config, processors, criteria) and then calls the object made
here instead of its own loop. Greedy text is the same; sampled text is drawn from the same distribution, with a seed
from torch's generator. Checked against transformers 5.23.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from draftsmith.infer.contract.protocols import Drafter, Rule
from draftsmith.infer.contract.row import Row
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.drafters.registry import check_drafter
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.engine.generate_call import check_call, make_rows, new_tokens, prompts
from draftsmith.infer.engine.kept import evaluating, kept_target
from draftsmith.infer.engine.lockstep import Lockstep
from draftsmith.infer.rules.named import DEFAULT, as_rule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def speculative(
    drafter: str | Drafter,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rule: str | Rule = DEFAULT,
) -> SpeculativeGenerate:
    """A `custom_generate` that drafts.

    `drafter` is written as for the commands (`pld`, `small:DRAFT`), or an object, which then serves one model.
    `tokenizer`: needed for `stop_strings`, because `generate` keeps its own to itself, and for a draft model whose
    vocabulary is padded differently. `rule`: token, block or traversal (infer/rules), or a rule of your own.
    """
    return SpeculativeGenerate(drafter, tokenizer, rule)


class SpeculativeGenerate:
    """What `speculative` makes. `generations`: the rows of the newest call, with their traces."""

    def __init__(self, drafter: str | Drafter, tokenizer: PreTrainedTokenizerBase | None, rule: str | Rule) -> None:
        if isinstance(drafter, str):
            check_drafter(drafter)
        self.generations: list[Generation] = []
        self._drafter = drafter
        self._tokenizer = tokenizer
        self._rule = as_rule(rule)

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        stop_strings: str | list[str] | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Called by `generate`, with what it gives to its own loops.

        `generate` moves arguments named here, and not in its own loop, from its keywords to this call: so the stop
        strings, which it would otherwise refuse for want of the tokenizer.
        """
        asked = {"synced_gpus": synced_gpus, "streamer": streamer, **self._kept_back()}
        check_call(model, generation_config, model_kwargs, asked)
        criteria = type(stopping_criteria)([*self._stop_strings(stop_strings), *stopping_criteria])
        texts = prompts(input_ids, model_kwargs)
        kept = kept_target(model)
        with kept.lock, evaluating(model):
            target, drafter = kept.bound(model, self._drafter, self._tokenizer)
            longest = max(len(text) for text in texts)
            limit = new_tokens(criteria, input_ids.shape[1], longest, target.max_positions)
            rows = make_rows(input_ids, texts, logits_processor, criteria, generation_config, limit)
            pad = generation_config._pad_token_tensor
            columns = Lockstep(input_ids, criteria, None if pad is None else int(pad), limit, asked["streamer"])
            with Engine(target, drafter, batch_size=len(rows), rule=self._rule) as engine:
                self.generations = _decode(engine, rows, columns)
        if asked["streamer"] is not None:
            asked["streamer"].end()
        if not generation_config.return_dict_in_generate:
            return columns.sequences
        from transformers.generation import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=columns.sequences)

    def _kept_back(self) -> Mapping[str, Any]:
        """Arguments of the `generate` call that is running this one.

        transformers 5.23 gives no streamer, assistant or `synced_gpus` to a callable `custom_generate`: without them a
        streamer would wait for ever. They are read from the frame whose `custom_generate` is this very object.
        """
        frame = sys._getframe(2)
        while frame is not None:
            found = frame.f_locals
            if found.get("custom_generate") is self and "streamer" in found:
                return {name: found.get(name) for name in ("streamer", "assistant_model", "synced_gpus")}
            frame = frame.f_back  # type: ignore[assignment]
        return {}

    def _stop_strings(self, strings: str | list[str] | None) -> list[Any]:
        from transformers.generation import StopStringCriteria

        if not strings:
            return []
        if self._tokenizer is None:
            raise ValueError("stop_strings need the tokenizer here as well: speculative(..., tokenizer=tokenizer)")
        return [StopStringCriteria(self._tokenizer, strings)]


def _decode(engine: Engine, rows: Sequence[Row], columns: Lockstep) -> list[Generation]:
    """Decode all rows in one batch until every column is complete; a row's error is the call's."""
    done: dict[Row, Generation] = {}
    for row in rows:
        engine.add(row)
    while len(done) < len(rows):
        for event in engine.step():
            if event.problem is not None:
                raise event.problem
            if event.done is not None:
                done[event.row] = event.done
        enough = columns.advance([row.new_ids for row in rows])
        for index in range(len(rows)) if columns.over else enough:
            if not rows[index].stop:
                engine.abort(rows[index])
    assert columns.over, "every row has ended, and a column is not complete"
    return [done[row] for row in rows]
