"""A forecast's chains and trees priced with a survey's costs: what would pay on that machine, before anything is run.

The draft's passes are those of its shape in the target's family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from draftsmith.infer.costs.identity import modelled_on
from draftsmith.infer.measure.forecast.drafting import Drafting
from draftsmith.infer.measure.forecast.outlook import priced, rows_of
from draftsmith.infer.measure.plan.head_shapes import CandidateHead
from draftsmith.infer.measure.plan.ranking import seconds
from draftsmith.infer.measure.plan.shapes import CandidateShape, SurveyRequest
from draftsmith.infer.measure.plan.survey import Survey
from draftsmith.infer.models.layers import head_size

# Priced besides those that were asked for, up to the largest of them.
BATCH_SIZES = (1, 2, 4, 8, 16, 32)


Shapes: TypeAlias = "Mapping[str, CandidateShape | CandidateHead]"


def forecast_shapes(results: Mapping[str, Any], config: Any) -> dict[str, CandidateShape | CandidateHead]:
    """The shape of each forecast draft; `heads` only where they are not of the target's size."""
    size, found = head_size(config.get_text_config()), dict[str, CandidateShape | CandidateHead]()
    for name, shape in results["shapes"].items():
        if "head" in shape:
            found[name] = CandidateHead.parse(shape["head"])
            continue
        layers, width, heads = (int(shape[key]) for key in ("layers", "width", "heads"))
        found[name] = CandidateShape(layers, width, 0 if heads * size == width else heads)
    return found


def check_forecast(results: Mapping[str, Any], tokenizer: str, path: str, target: str) -> None:
    """ValueError if the answers are not those of a target with this tokenizer (a fingerprint; "" if unknown)."""
    if tokenizer and results.get("tokenizer", tokenizer) != tokenizer:
        raise ValueError(f"{path} is a forecast of answers with another tokenizer than that of {target}")


def with_forecast(asked: SurveyRequest, results: Mapping[str, Any], shapes: Shapes, alone: bool) -> SurveyRequest:
    """Ask for the drafts' shapes as well, or `alone`, and for the sizes of all chains and trees that were forecast."""
    models = [one for one in shapes.values() if isinstance(one, CandidateShape)]
    heads = [one for one in shapes.values() if isinstance(one, CandidateHead)]
    # The loop and training are timed with the first shape.
    own = list(asked.shapes[: None if not alone else 0 if models else 1])
    sizes = {Drafting.parse(row["draft"]).nodes for _, _, row in rows_of(results)}
    return replace(
        asked,
        shapes=list(dict.fromkeys([*own, *models])),
        heads=list(dict.fromkeys([*asked.heads, *heads])),
        nodes=sorted({*asked.nodes, *sizes}),
    )


def priced_forecast(
    survey: Survey, results: Mapping[str, Any], shapes: Shapes, context: int | None = None
) -> dict[str, Any]:
    """The forecast with this survey's costs. `context`: of the steps; by default the texts' own."""

    def price(name: str, drafting: Drafting, rows: int, own: float) -> tuple[float, float]:
        behind = own if context is None else context
        plain = seconds(survey, "", None, rows, behind)
        return plain["step_s"], seconds(survey, str(shapes[name]), drafting, rows, behind)["step_s"]

    found = priced(results, batch_sizes(survey.asked.batch_sizes), price)
    return found | {
        "costs": survey.costs().describe(),
        "modelled": modelled_on(survey.machine) if survey.machine.get("modelled") else "",
        "draft_shapes": {name: str(shape) for name, shape in shapes.items()},
    }


def batch_sizes(asked: Sequence[int]) -> list[int]:
    return sorted({*asked, *(size for size in BATCH_SIZES if size <= max(asked))})
