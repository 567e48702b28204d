"""What a model really does with a chain that is taken back; no list of names decides.

As in infer/models/probe.py, a tiny twin decodes two rows of uneven length beyond every window of its config. Each round
runs the tokens that are left over from the round before, the newest token and a draft of it, accepts a part or all, and
compares every logit with a plain forward pass over that text.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from draftsmith.infer.models.positions import max_positions
from draftsmith.infer.models.probe import (
    BEYOND,
    HALF_TOLERANCE,
    OWN_TOLERANCE,
    difference,
    generate_fault,
    one_line,
    probed_once,
    shortened,
    tokens_to_try,
)
from draftsmith.infer.models.runner.chain_runner import ChainRunner
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.masks import ChainPlan
from draftsmith.infer.models.twin import tiny_twin, window_attributes

# Largest difference of a twin's chains in standard deviations of the logits: rounding makes 1e-5. A recurrence that is
# computed differently for one token than for several (a time step that only one of them limits) may show as 1e-4.
CHAIN_TOLERANCE = 5e-5
# Of each round, per row: how many tokens are drafted, and how many of them are accepted.
DRAFTED = ((5, 5), (4, 2), (3, 3), (0, 2), (4, 0))
ACCEPTED = ((5, 2), (1, 2), (3, 0), (0, 2), (4, 0))
DEPTH = 6


def probed_chain_plan(model: Any) -> ChainPlan:
    """The way in which the model's twin decodes chains right; ValueError with the reason if there is none."""
    return probed_once(model, _probe)


def check_chain(model: Any, plan: ChainPlan) -> None:
    """Refuse a loaded model whose own chains come out wrong though its twin's do not."""
    kind, dtype = model.config.model_type, next(model.parameters()).dtype
    tolerance = OWN_TOLERANCE.get(dtype, HALF_TOLERANCE)
    try:
        found = [[e for e in errors if not math.isnan(e)] for errors in chain_errors(model, plan, (6,), rounds=3)]
    except (IndexError, RuntimeError, TypeError, ValueError) as problem:
        raise ValueError(f"{kind} cannot decode a chain in {dtype}: {one_line(problem)}") from problem
    # Of each round, the median over tokens: an expert that rounding chooses differently is no fault.
    error = max(statistics.median(errors or [0.0]) for errors in found)
    if not error < tolerance:
        raise ValueError(
            f"{kind}: this model's logits for a token depend on how the text was cut into passes (by {error:.2g} of "
            f"their spread; {tolerance:g} is rounding)"
        )


def candidate_chain_plans(config: Any) -> list[ChainPlan]:
    """The ways that a config may mean, likeliest first; equal in number and order for a model and its twin."""
    config = config.get_text_config()
    sizes = list(dict.fromkeys(window_attributes(config).values()))
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    near = [kind for kind in kinds if "sliding" in kind or "local" in kind]
    attending = [kind for kind in kinds if kind in near or ("attention" in kind and "linear" not in kind)]
    plans = []
    for size in sizes if near else ():
        plans.append(ChainPlan({kind: size if kind in near else None for kind in attending}, by_kind=True))
    plans.append(ChainPlan())
    plans += [ChainPlan({"sliding_attention": size}) for size in sizes]
    return [*plans, *(ChainPlan(plan.windows, plan.by_kind, single=True) for plan in plans)]


@torch.inference_mode()
def chain_errors(model: Any, plan: ChainPlan, contexts: Sequence[int], rounds: int = len(DRAFTED)) -> list[list[float]]:
    """Of each round, per token, the largest difference of its logits from those of a plain forward pass over the same
    text, over their standard deviation. Row i has `contexts[i]` tokens, fewer if the model takes fewer positions."""
    limit = max_positions(model.config)
    rounds = min(rounds, max(1, limit // DEPTH - 1))
    texts = [
        tokens_to_try(model, length, 11 * row)
        for row, length in enumerate(shortened(contexts, max(limit - DEPTH * rounds, 1)))
    ]
    rows = list(range(len(texts)))
    runner = ChainRunner(model, plan)
    for row in rows:
        runner.open(row, len(texts[row]) + DEPTH * rounds)
    prompts = [text[:-1] for text in texts]
    read = [row for row in rows if prompts[row]]
    if read:
        runner.prefill(read, [prompts[row] for row in read])
    errors: list[list[float]] = []
    for number in range(rounds):
        errors.append([])
        drafted = [tokens_to_try(model, DRAFTED[number][row], 17 * row + 29 * number + 4) for row in rows]
        pending = [text[runner.length(row) :] for row, text in enumerate(texts)]
        chains = [Entries.chain(before + draft) for before, draft in zip(pending, drafted)]
        found = list(runner.forward(rows, chains).logits_NV.split([len(chain.tokens) for chain in chains]))
        for row in rows:
            ids_1T = torch.tensor([texts[row] + drafted[row]], device=runner.device)
            wanted_TV = model(ids_1T, use_cache=False).logits[0, runner.length(row) :]
            errors[-1] += [difference(*pair) for pair in zip(found[row], wanted_TV, strict=True)]
        kept = [min(ACCEPTED[number][row], len(drafted[row])) for row in rows]
        runner.commit(rows, [range(len(pending[row]) + kept[row]) for row in rows])
        for row in rows:
            texts[row] += drafted[row][: kept[row]] + tokens_to_try(model, 1, 3 * row + number)
    return errors


def _probe(model: Any) -> ChainPlan | str:
    """The plan, or why there is none."""
    kind = model.config.model_type
    try:
        twin = tiny_twin(model)
    except ValueError as problem:
        return f"{kind} cannot be probed: {problem}"
    outcomes = []
    small = candidate_chain_plans(twin.config)
    for plan, tiny in zip(candidate_chain_plans(model.config), small, strict=True):
        outcome = _outcome(twin, tiny)
        if isinstance(outcome, float) and outcome < CHAIN_TOLERANCE:
            return generate_fault(twin, model.config, CHAIN_TOLERANCE) or plan
        outcomes.append(outcome)
    fault = generate_fault(twin, model.config, CHAIN_TOLERANCE)
    if fault:
        return fault
    errors = [outcome for outcome in outcomes if isinstance(outcome, float)]
    if not errors:
        return f"{kind} cannot decode chains: {outcomes[0]}"
    return (
        f"{kind} does not continue from its states: logits of a chain, even token by token, differ from a plain "
        f"forward pass by {min(errors):.2g} of their spread"
    )


def _outcome(twin: Any, plan: ChainPlan) -> float | str:
    """The largest error of the twin's chains, or what it raised: what a family raises is its own choice."""
    try:
        errors = [error for errors in chain_errors(twin, plan, BEYOND) for error in errors]
        return max(errors) if all(error == error for error in errors) else float("inf")
    except Exception as problem:
        return one_line(problem)
