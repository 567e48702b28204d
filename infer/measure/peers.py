"""transformers' own decoding as runners: `generate`, assisted generation and prompt lookup, with the same weights.

They take one prompt at a time and get every sampling setting explicitly. TTFT is read from the streamer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from draftsmith.infer.contract.rng import uniform
from draftsmith.infer.contract.row import Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.measure.runners import Prompt

if TYPE_CHECKING:
    from draftsmith.infer.drafters.registry import Spec

KINDS = ("generate", "assistant", "prompt_lookup")


class _Clock:
    """A streamer that notes the time of each call: transformers hands it the prompt first, then each step's tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@dataclass(slots=True)
class TransformersRunner:
    """`options` are arguments of `generate`; for an assistant they update its generation config."""

    name: str
    model: Any
    tokenizer: Any
    settings: Settings
    stops: Stops
    assistant: Any = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def drawn(self) -> bool:
        return not self.settings.greedy

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Nothing to prepare."""

    def run(self, prompts: Sequence[Prompt]) -> list[Generation]:
        return [self._one(prompt) for prompt in prompts]

    def _one(self, prompt: Prompt) -> Generation:
        kwargs = self.settings.generation_kwargs() | {"max_new_tokens": self.stops.max_new_tokens}
        kwargs["eos_token_id"] = sorted(self.stops.ids) or None
        kwargs["pad_token_id"] = min(self.stops.ids, default=0)
        if self.stops.strings:
            kwargs |= {"stop_strings": list(self.stops.strings), "tokenizer": self.tokenizer}
        if self.assistant is not None:
            self.assistant.generation_config.update(**self.options)
            kwargs["assistant_model"] = self.assistant
        else:
            kwargs |= self.options
        torch.manual_seed(int(uniform(self.settings.seed, prompt.key, 0, "transformers") * 2**31))
        ids_1T = torch.tensor([prompt.token_ids], device=self.model.device)
        clock = _Clock()
        began = time.perf_counter()
        out_1T = self.model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), streamer=clock, **kwargs)
        ended = time.perf_counter()
        token_ids = out_1T[0, len(prompt.token_ids) :].tolist()
        return Generation(
            row=prompt.key,
            token_ids=token_ids,
            stop="max_new_tokens" if len(token_ids) >= self.stops.max_new_tokens else "eos",
            prompt_tokens=len(prompt.token_ids),
            first_s=(clock.times[1] if len(clock.times) > 1 else ended) - began,
            seconds=ended - began,
        )


def parse_peers(specs: str) -> list[Spec]:
    """The peers of a comma-separated list, with their names and models checked; loads nothing."""
    from draftsmith.infer.drafters.registry import parse_spec, split_outside_brackets
    from draftsmith.infer.models.load import check_model

    peers = [parse_spec(text) for text in split_outside_brackets(specs)]
    for spec in peers:
        if spec.name not in KINDS:
            raise ValueError(f"unknown peer {spec.name!r}: known are {', '.join(KINDS)}")
        if spec.name == "assistant" and not spec.argument:
            raise ValueError("the peer assistant needs a model: assistant:MODEL")
        if spec.name == "assistant":
            check_model(spec.argument)
        elif spec.argument:
            raise ValueError(f"the peer {spec.name} takes nothing after a colon")
    return peers


def load_peers(
    specs: str, target: str, dtype: str, device: str, settings: Settings, stops: Stops
) -> list[TransformersRunner]:
    """`generate,prompt_lookup,assistant:MODEL`, options in brackets: `assistant:MODEL[num_assistant_tokens=5]`.

    They decode with their own copy of the target, loaded by transformers without our patches.
    """
    from draftsmith.infer.models.load import load_model

    runners: list[TransformersRunner] = []
    peers = parse_peers(specs)
    if not peers:
        return runners
    model, tokenizer = load_model(target, dtype=dtype, device=device)
    for spec in peers:
        assistant, options = None, dict(spec.init_args)
        if spec.name == "assistant":
            assistant, _ = load_model(spec.argument, dtype=dtype, device=device)
        if spec.name == "prompt_lookup":
            options.setdefault("prompt_lookup_num_tokens", 10)
        name = spec.label or f"transformers {spec.name}"
        count = sum(runner.name.split("#")[0] == name for runner in runners)
        name = f"{name}#{count + 1}" if count else name
        runners.append(TransformersRunner(name, model, tokenizer, settings, stops, assistant, options))
    return runners
