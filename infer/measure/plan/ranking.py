"""Predictions of `plan` from a survey's costs: speedup ceilings, break-evens, and a ranking of shapes and lengths.

Throughput of n drafted tokens as in "Decoding Speculative Decoding" (arXiv 2402.01528), plus the loop's own time:
speedup = accepted_length * plain step / (draft passes + verification of n + 1 tokens + overhead).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from draftsmith.infer.measure.forecast.drafting import Drafting, step_seconds
from draftsmith.infer.measure.plan.head_shapes import drafting_of
from draftsmith.infer.measure.plan.survey import Survey
from draftsmith.infer.measure.predicted import AcceptanceByDepth, Prediction, expected_length, largest_that_pays

GOALS = (1.0, 1.5, 2.0)
FORMULA = "6 * multiplied weights * tokens / FLOP/s; distilled from a live target: + 2 * the target's * tokens / FLOP/s"


def seconds(survey: Survey, shape: str, drafting: Drafting | None, rows: int, context: float) -> dict[str, float]:
    """The parts of a step; `drafting` None is a plain step."""
    drafts = [survey.passes[shape]] if drafting else []
    drafting = drafting and drafting_of(survey.asked.heads, shape, drafting)
    overhead_s = survey.overhead(rows, len(drafting.passes) if drafting else 0)
    return step_seconds(survey.passes["target"], drafts, drafting, rows, context, overhead_s)


def predict(
    survey: Survey, shape: str, drafting: Drafting, rows: int, context: float, accepted_length: float
) -> Prediction:
    """The predicted speedup of a shape and a way to draft, at an accepted_length."""
    plain_s = seconds(survey, "", None, rows, context)["step_s"]
    return Prediction(rows, accepted_length, plain_s, seconds(survey, shape, drafting, rows, context)["step_s"])


@dataclass(frozen=True, slots=True)
class Wish:
    """What to rank: ways to draft, the context, and the acceptance of chains and trees, if known."""

    drafting: Sequence[Drafting]
    context: int
    chains: AcceptanceByDepth | None = None
    trees: AcceptanceByDepth | None = None

    def curve(self, drafting: Drafting) -> AcceptanceByDepth | None:
        return self.trees if drafting.tree else self.chains


def evaluate(survey: Survey, wish: Wish) -> dict[str, Any]:
    """Steps, ranking and verdict per batch size, as JSON. `steps` are shapes x drafts, fastest first (highest ceiling
    first if no acceptance is known)."""
    shapes = _shapes(survey)
    batches = []
    for rows in survey.asked.batch_sizes:
        steps = [_step(survey, wish, shape, drafting, rows) for shape, drafting in _drafted(survey, wish.drafting)]
        steps.sort(key=lambda step: (-(step["speedup"] or 0.0), -step["ceiling"]))
        ranking = _ranking(survey, wish, shapes, steps, rows)
        plain = seconds(survey, "", None, rows, wish.context)
        batches.append(
            {
                "batch_size": rows,
                "plain_step_s": plain["step_s"],
                "plain_tokens_per_s": rows / plain["step_s"],
                "verify_s": {
                    str(n): survey.passes["target"].even(rows, n + 1, wish.context) for n in survey.asked.nodes
                },
                "steps": steps,
                "ranking": ranking,
                "verdict": _verdict(steps, ranking),
            }
        )
    return {"context": wish.context, "acceptance": wish.chains, "tree_acceptance": wish.trees, "batches": batches}


def _shapes(survey: Survey) -> list[str]:
    return [*survey.asked.timed, *map(str, survey.asked.estimated)]


def _drafted(survey: Survey, drafting: Sequence[Drafting]) -> list[tuple[str, Drafting]]:
    """Every shape with each of its drafts: heads may draft no deeper than there are of them."""
    deepest = {str(head): head.depth for head in survey.asked.heads}
    return [(shape, one) for shape in _shapes(survey) for one in drafting if one.depth <= deepest.get(shape, one.depth)]


def _step(survey: Survey, wish: Wish, shape: str, drafting: Drafting, rows: int) -> dict[str, Any]:
    """One shape and one way to draft: its costs, its ceiling, and the accepted_length that each goal needs."""
    curve = wish.curve(drafting)
    length = expected_length(curve, drafting.depth) if curve else None
    ceiling = predict(survey, shape, drafting, rows, wish.context, drafting.depth + 1)
    return {
        "shape": shape,
        "draft": drafting.name,
        "nodes": drafting.nodes,
        "depth": drafting.depth,
        **seconds(survey, shape, drafting, rows, wish.context),
        "ceiling": ceiling.speedup,
        "break_even": ceiling.break_even,
        "needs": {f"{goal:g}": goal * ceiling.break_even for goal in GOALS},
        "accepted_length": length,
        "speedup": None if length is None else length / ceiling.break_even,
    }


def _ranking(
    survey: Survey, wish: Wish, shapes: Sequence[str], steps: Sequence[dict[str, Any]], rows: int
) -> list[dict[str, Any]]:
    """Each shape at its best, best shape first: by speedup, or by the acceptance needed to break even if none is known.

    `needs_acceptance` is per drafted token, the same at every depth, at the length that suits it best.
    """
    found: list[dict[str, Any]] = []
    chains = {
        shape: [one for one in steps if one["shape"] == shape and one["depth"] == one["nodes"]] for shape in shapes
    }
    for shape in shapes:
        own = [step for step in steps if step["shape"] == shape]
        judged = [step for step in own if step["speedup"] is not None]
        found.append(
            {
                "shape": shape,
                "best": max(judged, key=lambda step: step["speedup"]) if judged else None,
                "ceiling": max(own, key=lambda step: step["ceiling"]),
                "needs_acceptance": {f"{goal:g}": least_acceptance(chains[shape], goal) for goal in GOALS},
            }
        )
    if not any(row["best"] for row in found):
        return sorted(found, key=lambda row: row["needs_acceptance"]["1"] or 2.0)
    found.sort(key=lambda row: -row["best"]["speedup"])
    for row in found:
        row["to_be_first"] = least_acceptance(chains[row["shape"]], found[0]["best"]["speedup"])
    return found


def least_acceptance(chains: Sequence[dict[str, Any]], goal: float) -> float | None:
    """The smallest acceptance, the same at every depth, at which some length reaches the goal; None: not even at 1."""

    def best(share: float) -> float:
        return max((expected_length((share,), step["depth"]) / step["break_even"] for step in chains), default=0.0)

    if best(1.0) < goal:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if best(middle) >= goal else (middle, high)
    return high


def _verdict(steps: Sequence[dict[str, Any]], ranking: Sequence[dict[str, Any]]) -> str:
    """A sentence: whether to draft, and how."""
    highest = max(steps, key=lambda step: step["ceiling"])
    if highest["ceiling"] <= 1:
        return "plain decoding wins whatever is drafted: even if every token were accepted, no shape would be faster"
    best = ranking[0]["best"]
    if best is None:
        need = ranking[0]["needs_acceptance"]["1"]
        return (
            f"{ranking[0]['shape']} breaks even at the lowest acceptance, {need:.2f} per drafted token; the ceiling is "
            f"{highest['ceiling']:.2f}x with {highest['shape']} drafting {highest['draft']}"
        )
    text = f"{best['shape']} drafting {best['draft']}: {best['speedup']:.2f}x at this acceptance"
    if best["speedup"] <= 1:
        return f"plain decoding wins at this acceptance: the best draft is {text}"
    return text + f", break-even at an accepted_length of {best['break_even']:.2f}"


def memory_and_hours(survey: Survey, training_tokens: int) -> dict[str, dict[str, float]]:
    """Per shape: memory to decode and to train, and hours of training on this machine.

    Hours are 6 * multiplied weights * tokens / (measured FLOP/s); distilling from a live target adds 2 * the target's
    multiplied weights * tokens at the same rate, and heads always read one. Checkpointing, data and validation are not
    included, nor that an EAGLE head is unrolled several times.
    """
    heads = set(map(str, survey.asked.heads))
    target, context = survey.sizes["target"], max(survey.asked.contexts)
    rows = max(survey.asked.batch_sizes)
    found = {}
    for name, size in survey.sizes.items():
        if name == "target":
            continue
        work = 6 * size.multiplied * training_tokens
        teacher = 2 * target.multiplied * training_tokens
        found[name] = {
            "parameters": size.parameters,
            "weight_bytes": size.total_bytes,
            "cache_bytes": size.token_bytes * rows * context,
            "training_bytes": size.training_bytes,
            "hours": (work + (teacher if name in heads else 0)) / survey.training_flops / 3600,
            "hours_distilled": (work + teacher) / survey.training_flops / 3600,
        }
    return found


def pays_up_to(survey: Survey, wish: Wish) -> int | None:
    """The largest batch size at which the best draft beats plain decoding; None if no acceptance is known."""
    curves = {drafting: curve for drafting in wish.drafting if (curve := wish.curve(drafting))}
    if not curves:
        return None

    def best(rows: int) -> Prediction:
        found = [
            predict(survey, shape, drafting, rows, wish.context, expected_length(curves[drafting], drafting.depth))
            for shape, drafting in _drafted(survey, list(curves))
        ]
        return max(found, key=lambda one: one.speedup)

    return largest_that_pays(best, max(survey.asked.batch_sizes))


def report(survey: Survey, wish: Wish, training_tokens: int) -> dict[str, Any]:
    """The whole output of `draftsmith plan`, as JSON."""
    memory = memory_and_hours(survey, training_tokens)
    modelled = bool(survey.machine.get("modelled"))
    measured = set() if modelled else set(survey.asked.timed)
    shapes = {
        name: {
            "measured": name in measured,
            **row,
            "pass_s": {str(rows): survey.passes[name].even(rows, 1, wish.context) for rows in survey.asked.batch_sizes},
        }
        for name, row in memory.items()
    }
    return {
        "machine": survey.machine,
        "modelled": modelled,
        **evaluate(survey, wish),
        "pays_up_to": pays_up_to(survey, wish),
        "shapes": shapes,
        "target": survey.sizes["target"].to_json(),
        "overhead": asdict(survey.overhead),
        "fit_errors": {name: _spread(errors) for name, errors in survey.errors.items() if errors},
        "training": {"tokens": training_tokens, "flops": survey.training_flops, "formula": FORMULA},
    }


def _spread(errors: Sequence[float]) -> dict[str, float]:
    """Median and worst relative error, without sign."""
    sizes = sorted(map(abs, errors))
    return {"median": sizes[len(sizes) // 2], "worst": sizes[-1]}
