"""What a model really does with a tree of tokens, found by trying it out; no list of names decides.

Two checks at load. A tiny twin of the model (twin.py) decodes two rows of uneven length beyond every window of its
config: which of the masks that the config may mean make each node's logits equal those of its path run on its own? And
the loaded model itself runs one tree, which shows what a twin cannot: weights whose products depend on a token's
neighbours.

Legend: T positions, Q queries, V vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from draftsmith.infer.models.positions import max_positions
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.masks import MaskPlan
from draftsmith.infer.models.runner.model_runner import ModelRunner
from draftsmith.infer.models.twin import VOCAB, tiny_twin, window_attributes

# Largest difference in standard deviations of the logits. A float32 twin's is about 1e-6 if the masks are right, above
# 0.01 if one token too many or too few is seen.
TWIN_TOLERANCE = 1e-3
# Of the loaded model, the median over nodes: an expert that rounding chooses differently is no fault.
OWN_TOLERANCE = {torch.float64: 1e-3, torch.float32: 2e-2}
HALF_TOLERANCE = 0.15
BEYOND, WITHIN = (29, 43), (2, 1)
TREES = ([-1, -1, 0, 1, 2], [-1, 0, -1])
DEPTH = 4  # positions that a round of the deepest tree takes, the token before it included
# What a flag must not be for tokens to see only those before them.
BIDIRECTIONAL = {"use_bidirectional_attention": True, "is_causal": False}

Plan = TypeVar("Plan")

# Outcomes by what is probed, and by class, config and attention of the model.
_found: dict[tuple[Any, type, str, str], Any] = {}


def probed_plan(model: Any) -> MaskPlan:
    """The masks with which the model's twin decodes trees right; ValueError with the reason if there are none."""
    return probed_once(model, _probe)


def probed_once(model: Any, probe: Callable[[Any], Plan | str]) -> Plan:
    """What `probe` finds for models like this one, which is tried once; ValueError if it is a reason."""
    key = probe, type(model), model.config.to_json_string(use_diff=False), str(model.config._attn_implementation)
    if key not in _found:
        with quiet():
            _found[key] = probe(model)
    found: Plan | str = _found[key]
    if isinstance(found, str):
        raise ValueError(found)
    return found


def check_neighbours(model: Any, plan: MaskPlan) -> None:
    """Refuse a loaded model whose logits for a token depend on the other tokens of the pass.

    Where its logits are NaN or infinite without any tree, the step says so, with row and position."""
    dtype = next(model.parameters()).dtype
    tolerance = OWN_TOLERANCE.get(dtype, HALF_TOLERANCE)
    try:
        errors = [error for error in tree_errors(model, plan, (6,), rounds=1) if not math.isnan(error)]
    except (IndexError, RuntimeError, TypeError, ValueError) as problem:
        kind = model.config.model_type
        raise ValueError(f"{kind} cannot decode a tree in {dtype}: {one_line(problem)}") from problem
    error = statistics.median(errors or [0.0])
    if not error < tolerance:
        raise ValueError(
            f"{model.config.model_type}: this model's logits for a token depend on the other tokens in the same pass "
            f"(by {error:.2g} of their spread; {tolerance:g} is rounding), as dynamic quantisation makes them: load it "
            "without"
        )


def candidate_plans(config: Any) -> list[MaskPlan]:
    """The masks that a config may mean, likeliest first; equal in number and order for a model and its twin."""
    config = config.get_text_config()
    sizes = list(dict.fromkeys(window_attributes(config).values()))
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    plans = []
    if kinds:
        near = [kind for kind in kinds if "sliding" in kind or "local" in kind]
        for size in sizes if near else [None]:
            plans.append(MaskPlan({kind: size if kind in near else None for kind in kinds}, by_kind=True))
    plans += [MaskPlan({"sliding_attention": size}) for size in sizes]
    plans.append(MaskPlan())
    return [*plans, *(replace(plan, packed=False) for plan in plans)]


@torch.inference_mode()
def tree_errors(model: Any, plan: MaskPlan, contexts: Sequence[int], rounds: int = 2) -> list[float]:
    """Per node, the largest difference of its logits from those of its path in a plain forward pass, over their
    standard deviation. Row i has `contexts[i]` tokens, fewer if the model takes fewer positions; each round drafts a
    tree per row and commits one path of it."""
    limit = max_positions(model.config)
    rounds = min(rounds, max(1, limit // DEPTH))
    contexts = shortened(contexts, limit + 1 - DEPTH * rounds)
    texts = [tokens_to_try(model, length, 11 * row) for row, length in enumerate(contexts)]
    rows = list(range(len(texts)))
    lm = ModelRunner(model, plan)
    for row in rows:
        lm.open(row, len(texts[row]) + 8 * rounds)
    lm.prefill(rows, [text[:-1] for text in texts])
    errors = []
    for number in range(rounds):
        drafted = [tokens_to_try(model, len(TREES[row]), 17 * row + 29 * number + 4) for row in rows]
        entries = [
            Entries([texts[row][-1], *drafted[row]], [-1, *(parent + 1 for parent in TREES[row])]) for row in rows
        ]
        counts = [len(entry.tokens) for entry in entries]
        logits = lm.forward(rows, entries).logits_NV.split(counts)
        for row in rows:
            parents = TREES[row]
            for leaf in sorted(set(range(len(parents))) - set(parents)):
                path = _path(parents, leaf)
                ids = [*texts[row], *(drafted[row][node] for node in path)]
                alone_TV = model(torch.tensor([ids], device=lm.device), use_cache=False).logits[0]
                for node, alone_V in zip([0, *(node + 1 for node in path)], alone_TV[len(texts[row]) - 1 :]):
                    errors.append(difference(logits[row][node], alone_V))
            kept = _path(parents, len(parents) - 1)
            lm.commit([row], [[0, *(node + 1 for node in kept)]])
            texts[row] += [*(drafted[row][node] for node in kept), *tokens_to_try(model, 1, 3 * row + number)]
    return errors


def shortened(contexts: Sequence[int], longest: int) -> list[int]:
    """Lengths in proportion, none beyond `longest`."""
    return [max(1, min(length, longest * length // max(contexts))) for length in contexts]


def difference(found_V: torch.Tensor, wanted_V: torch.Tensor) -> float:
    """The largest difference over the standard deviation; NaN if it is `wanted_V` that holds NaN or infinity.

    A token may have -inf in both: the model bans it."""
    if not wanted_V.max().isfinite():
        return math.nan
    finite_V = wanted_V.isfinite()
    if not torch.equal(found_V.isfinite(), finite_V):
        return math.inf
    difference = float((found_V - wanted_V)[finite_V].abs().max())
    return difference / float(wanted_V[finite_V].std()) if difference else 0.0


def tokens_to_try(model: Any, count: int, start: int) -> list[int]:
    """Ids to try, without the lowest and highest, which may be special."""
    vocab = min(int(model.config.get_text_config().vocab_size), VOCAB)
    low = 8 if vocab > 32 else 0
    span = vocab - 2 * low
    step = 7 if span % 7 else 13
    return [low + (step * at + start) % span for at in range(count)]


def _path(parents: Sequence[int], node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def _probe(model: Any) -> MaskPlan | str:
    """The plan, or why there is none."""
    kind = model.config.model_type
    try:
        twin = tiny_twin(model)
    except ValueError as problem:
        return f"{kind} cannot be probed: {problem}"
    if "past_key_values" not in inspect.signature(twin.forward).parameters:
        return f"{kind} takes no cache of keys and values"
    small = candidate_plans(twin.config)
    outcomes = []
    for plan, tiny in zip(candidate_plans(model.config), small, strict=True):
        outcome = _outcome(twin, tiny, BEYOND)
        if isinstance(outcome, float) and outcome < TWIN_TOLERANCE:
            return generate_fault(twin, model.config) or plan
        outcomes.append(outcome)
    windows = window_attributes(model.config.get_text_config())
    within = _outcome(twin, small[-1], WITHIN, rounds=1)
    if windows and isinstance(within, float) and within < TWIN_TOLERANCE:
        named = ", ".join(f"{name}={size}" for name, size in windows.items())
        return f"{kind} takes no tree mask beyond {named}: its layers apply that limit to cache slots, not positions"
    fault = generate_fault(twin, model.config)
    if fault:
        return fault
    errors = [outcome for outcome in outcomes if isinstance(outcome, float)]
    if not errors:
        return f"{kind} cannot decode trees: {outcomes[-1]}"
    return (
        f"{kind} does not honour a tree mask: logits of a tree differ from those of its paths by {min(errors):.2g} of "
        f"their spread{_suspects(model.config)}"
    )


def _outcome(twin: Any, plan: MaskPlan, contexts: Sequence[int], rounds: int = 2) -> float | str:
    """The largest error of the twin's trees, or what it raised: what a family raises is its own choice."""
    try:
        errors = tree_errors(twin, plan, contexts, rounds)
        return max(errors) if all(error == error for error in errors) else float("inf")
    except Exception as problem:
        return one_line(problem)


def generate_fault(twin: Any, config: Any, tolerance: float = TWIN_TOLERANCE) -> str | None:
    """Why `generate` and a plain forward pass give other tokens, if they do: no decoding could equal both."""
    from transformers import GenerationConfig

    kind = config.model_type
    (length,) = shortened(BEYOND[:1], max_positions(twin.config) - 4)
    ids_1T = torch.tensor([tokens_to_try(twin, length, 0)])
    twin.generation_config = GenerationConfig(pad_token_id=0)
    try:
        with torch.inference_mode():
            made = twin.generate(
                ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                max_new_tokens=4,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            plain_TV = twin(made.sequences, use_cache=False).logits[0, length - 1 : -1]
    except Exception as problem:
        return f"{kind}: transformers' own generate fails on it: {one_line(problem)}{_suspects(config)}"
    cached_TV = torch.cat(made.logits)
    error = float((cached_TV - plain_TV).abs().max() / plain_TV.std())
    if error < tolerance:
        return None
    return (
        f"{kind}: transformers' generate and a plain forward pass of the model differ by {error:.2g} of the logits' "
        f"spread, so there is no one answer to keep to{_suspects(config)}"
    )


def _suspects(config: Any) -> str:
    """The attributes of a config that most likely are the cause, as a message names them."""
    text = config.get_text_config()
    found = [f"{name}={value}" for name, value in BIDIRECTIONAL.items() if getattr(text, name, None) is value]
    if not found:
        found = [f"{name}={size}" for name, size in window_attributes(text).items()]
        if any(kind != "full_attention" for kind in getattr(text, "layer_types", None) or ()):
            found.append("layer_types")
    if not found and getattr(text, "is_decoder", True) is False:
        found = ["is_decoder=False"]
    return f"; check {' and '.join(found)} in its config.json" if found else ""


def one_line(problem: Exception) -> str:
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:200]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what families print, log or warn about a tiny random config; the global log level is put back."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
