"""Candidates along the target's own answers: their confidence, and whether each was the answer's next token.

A draft model that reads text is read in one pass over prompt and answer (`read_exits`): along a given text its
candidates do not depend on how it is run. Any other drafter runs in the decoding loop, with the recorded answer for the
target, and the candidates at every node on the answer's path are noted (`listen`); other nodes were never up for
acceptance.

Confidences are read before any draw and at temperature 1, as drafters state them. Sampled answers count like greedy
ones: for outright candidates, the probability of acceptance is that of being the token drawn. Coupled candidates
(infer/drafters/coupled.py) are found again with the noise that drew the answers, which their rows' keys and seed give.

Legend: N observations (in `ExitProbabilities`: positions of answer tokens), K candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Budget, Drafter, Feedback, Target, Verdict, drafts_unread
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.costs.calibration import TOP
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters.coupled import Race
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.measure.calibrate.answers import Answered
from draftsmith.infer.models.layers import check_parts, find_parts, state_of
from draftsmith.infer.models.positions import max_positions
from draftsmith.infer.models.recorded_target import RecordedTarget

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Observations:
    """Candidates that were up for acceptance: the number of the prompt, the rank among siblings (0 is tried first), the
    raw confidence, and whether the candidate was the target's own next token."""

    prompt_N: np.ndarray
    rank_N: np.ndarray
    raw_N: np.ndarray
    accepted_N: np.ndarray

    def __len__(self) -> int:
        return len(self.raw_N)

    def where(self, held_N: np.ndarray) -> Observations:
        return Observations(self.prompt_N[held_N], self.rank_N[held_N], self.raw_N[held_N], self.accepted_N[held_N])


@dataclass(frozen=True, slots=True)
class ExitProbabilities:
    """One exit over all answers: per position the prompt's number, the confidences of the candidates, best first, the
    rank of the answer's token among them (K if it is not there), and the probability of the likeliest token, by which
    exits are chosen."""

    prompt_N: np.ndarray
    probs_NK: np.ndarray
    rank_N: np.ndarray
    top_N: np.ndarray

    def observations(self) -> Observations:
        """Every candidate at every position."""
        count, width = self.probs_NK.shape
        ranks_NK = np.tile(np.arange(width), (count, 1))
        return Observations(
            np.repeat(self.prompt_N, width),
            ranks_NK.ravel(),
            self.probs_NK.ravel(),
            (ranks_NK == self.rank_N[:, None]).ravel(),
        ).where((self.probs_NK > 0).ravel())

    def covers(self, top: int) -> np.ndarray:
        """[N] whether the answer's token is among the `top` best candidates."""
        found_N: np.ndarray = self.rank_N < top
        return found_N


@torch.inference_mode()
def read_exits(
    model: Any,
    exits: Sequence[int],
    answers: Sequence[Answered],
    vocab_size: int,
    progress: Progress | None = None,
    *,
    race: Race | None = None,
    settings: Settings | None = None,
) -> dict[int, ExitProbabilities]:
    """The candidates of every exit, up to the end of the model's context.

    `vocab_size`: the number of ids that draft and target share. `race`: the candidates are coupled with the draws that
    gave these answers with `settings`; else they are the likeliest tokens.
    """
    config = model.config.get_text_config()
    room, depth = max_positions(config), int(config.num_hidden_layers)
    early = [exit for exit in exits if exit != depth]
    found: dict[int, list[tuple[np.ndarray, ...]]] = {exit: [] for exit in exits}
    with _states_after(model, early) as (layers, states):
        for number, one in enumerate(answers, start=1):
            ids = torch.tensor([*one.prompt, *one.answer][: room + 1], device=model.device)
            if len(ids) > len(one.prompt):
                where_N = torch.arange(len(one.prompt) - 1, len(ids) - 1, device=model.device)
                last = model(input_ids=ids[None, :-1], use_cache=False, logits_to_keep=where_N).logits[0]
                for exit in exits:
                    logits_NV = last if exit == depth else layers.logits(states[exit][0, where_N])
                    logits_NV = logits_NV[:, :vocab_size].float()
                    top_NK = _likeliest(logits_NV)
                    tokens_NK, probs_NK = top_NK
                    if race is not None and settings is not None:
                        positions = (where_N + 1).tolist()
                        tokens_NK, probs_NK = race.arrivals(logits_NV, settings, one.key, positions, probs_NK.shape[-1])
                    rank_N = _rank(tokens_NK, probs_NK, ids[where_N + 1])
                    parts_N = (probs_NK.double(), rank_N, top_NK[1][:, 0].double())
                    read = [np.full(len(rank_N), one.number), *(part.cpu().numpy() for part in parts_N)]
                    found[exit].append(tuple(read))
            if progress is not None:
                progress(number, len(answers))
    if not all(found.values()):
        raise ValueError(f"every prompt is longer than the draft model's context of {room} tokens")
    return {exit: ExitProbabilities(*(np.concatenate(each) for each in zip(*some))) for exit, some in found.items()}


@contextmanager
def _states_after(model: Any, early: Sequence[int]) -> Iterator[tuple[Any, dict[int, torch.Tensor]]]:
    """The model's parts, and the states [1, T, D] after each of the layers `early`, filled by every forward pass."""
    states: dict[int, torch.Tensor] = {}
    if not early:
        yield None, states
        return
    parts = find_parts(model)
    check_parts(model, parts)

    def keeper(exit: int) -> Any:
        def keep(module: Any, given: Any, output: Any) -> None:
            states[exit] = state_of(output)

        return keep

    hooks = [parts.layers[exit - 1].register_forward_hook(keeper(exit)) for exit in early]
    try:
        yield parts, states
    finally:
        for hook in hooks:
            hook.remove()


def _likeliest(logits_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] the likeliest tokens and their probabilities."""
    top = torch.topk(logits_NV, min(max(TOP), logits_NV.shape[-1]), dim=-1)
    return top.indices, (top.values - torch.logsumexp(logits_NV, -1, keepdim=True)).exp()


def _rank(tokens_NK: torch.Tensor, probs_NK: torch.Tensor, next_N: torch.Tensor) -> torch.Tensor:
    """[N] the rank of the next token among the candidates that have a probability, K if it is not there."""
    hit_NK = (tokens_NK == next_N[:, None]) & (probs_NK > 0)
    return torch.where(hit_NK.any(-1), hit_NK.int().argmax(-1), hit_NK.shape[-1])


class Listener:
    """Wraps a drafter and notes (prompt, rank, confidence, accepted) of every candidate up for acceptance, by source.

    `numbers`: row key -> the prompt's number.
    """

    def __init__(self, drafter: Drafter, numbers: dict[str, int]) -> None:
        self.drafter = drafter
        self.numbers = numbers
        self.noted: dict[str, list[tuple[int, int, float, bool]]] = {}
        self.name, self.features, self.origin = drafter.name, drafter.features, drafter.origin
        self.drafts_unread = drafts_unread(drafter)
        self.bind, self.open, self.close = drafter.bind, drafter.open, drafter.close
        self.read, self.abandon, self.pass_timers = drafter.read, drafter.abandon, drafter.pass_timers
        self._drafts: dict[Row, Draft] = {}

    @property
    def forward_seconds(self) -> float:
        return self.drafter.forward_seconds

    @property
    def bytes_moved(self) -> int:
        return self.drafter.bytes_moved

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Policy | None = None) -> list[Draft]:
        drafts = self.drafter.propose(rows, budgets, policy)
        self._drafts = dict(zip(rows, drafts))
        return drafts

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        for row, verdict in zip(rows, verdicts):
            self._note(self.numbers[row.key], self._drafts[row], verdict)
        self.drafter.observe(rows, verdicts, feedback)

    def _note(self, number: int, draft: Draft, verdict: Verdict) -> None:
        """Committed token i follows node i - 1 of the path; what a stop cut off was not up for acceptance."""
        for parent, token in zip((ROOT, *verdict.path), verdict.committed):
            for rank, trial in enumerate(draft.trials.get(parent, ())):
                noted = (number, rank, trial.confidence, draft.tokens[trial.node] == token)
                self.noted.setdefault(trial.source, []).append(noted)


def listen(
    drafter: Drafter,
    target: Target,
    answers: Sequence[Answered],
    settings: Settings,
    stops: Stops,
    progress: Progress | None = None,
) -> dict[str, Observations]:
    """Observations by source of `drafter`, which must be bound to `target`.

    A drafter that reads the target's states runs with the target itself, which gives the same answers again.
    """
    judge = target
    if not drafter.features:
        recorded = {one.key: one.answer for one in answers}
        judge = RecordedTarget(recorded, target.vocab_size, target.tokenizer, sampled=not settings.greedy)
    listener = Listener(drafter, {one.key: one.number for one in answers})
    engine = Engine(judge, listener, policy=Policy(raw=True))  # which limits nothing: all candidates are wanted
    for done, one in enumerate(answers, start=1):
        ends = stops if drafter.features else Stops(len(one.answer))
        engine.run([Row(one.key, list(one.prompt), settings, ends, target.tokenizer)], strict=True)
        if progress is not None:
            progress(done, len(answers))
    return {source: Observations(*(np.array(each) for each in zip(*some))) for source, some in listener.noted.items()}
