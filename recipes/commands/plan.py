"""`draftsmith plan`: before anything is trained, which draft would pay, on this machine, for this target."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Any


def plan(
    *,
    target: str,
    batch_sizes: Sequence[int] = (1, 8, 32),
    contexts: Sequence[int] = (128, 1024),
    shapes: str = "",
    estimate: str = "",
    lengths: Sequence[int] = (1, 2, 3, 4, 6, 8, 12, 16),
    trees: str = "14x4,30x6",
    acceptance: str = "",
    tree_acceptance: str = "",
    context: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    training_tokens: int = 100_000_000,
    seconds: float = 600.0,
    out: str | None = None,
    plot: str | None = None,
    json: bool = False,
) -> None:
    """Measure draft shapes and verification on this machine with random weights, and rank shapes x lengths.

    Example: draftsmith plan --target TARGET --acceptance 0.7

    Args:
        target: folder, Hub name, or a config.json: only the config is read.
        batch_sizes: rows decoded together.
        contexts: committed tokens of a row at which passes are timed; between and beyond them the fit tells.
        shapes: that are measured: LAYERSxWIDTH or LAYERSxWIDTHxHEADS; by default the target's own width with 1, 2, 3
            and 5 layers, and half of it.
        estimate: shapes whose costs are estimated from those measured.
        lengths: of drafted chains.
        trees: NODESxDEPTH.
        acceptance: of a chain's tokens: a share (0.7), shares by depth (0.8,0.7,0.6), or a result of bench or replay
            as FILE or FILE:DRAFTER. Without it, shapes are ranked by the acceptance that they need.
        tree_acceptance: likewise of trees: the share of steps that get from one depth to the next.
        context: that the tables are for; by default the mean of contexts.
        dtype: of the weights; auto is the config's.
        device: auto is CUDA where there is one.
        training_tokens: that training would see, for the hours.
        seconds: that timing the passes may take.
        out: write the costs here, for `replay --latency`.
        plot: write an SVG picture of speedups over lengths here, a name that ends in .svg.
        json: print one JSON object on the last line.
    """
    from draftsmith.infer.files.atomic import written_beside
    from draftsmith.infer.measure import tables
    from draftsmith.infer.measure.acceptance import parse
    from draftsmith.infer.measure.plan.ranking import Wish, report
    from draftsmith.infer.measure.plan.survey import survey
    from draftsmith.infer.measure.plan.tables import draw, plan_tables

    chains = parse(acceptance) if acceptance else None
    grown = parse(tree_acceptance, trees=True) if tree_acceptance else None
    for name in (out, plot):
        _check_place(name)
    if plot and Path(plot).suffix != ".svg":
        raise ValueError(f"--plot writes SVG: name a file that ends in .svg, not {plot}")
    config, kind, where, asked, drafting = _asked(locals())
    wish = Wish(drafting, context or sum(asked.contexts) // len(asked.contexts), chains, grown)
    for name, value in (("training_tokens", training_tokens), ("context", wish.context)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    found = survey(config, kind, where, asked, seconds=seconds, progress=_progress)
    said = report(found, wish, training_tokens)
    if out:
        with written_beside(Path(out)) as file:
            file.write(dumps(found.costs().to_json(), indent=1) + "\n")
    if plot:
        draw(said, Path(plot))
    if json:
        print(dumps(said))
    else:
        tables.show(plan_tables(said))


def _asked(given: dict[str, Any]) -> tuple[Any, Any, Any, Any, list[Any]]:
    """Config, type, device, what is measured and how is drafted, from the command line's words."""
    from draftsmith.infer.measure.plan.ranking import Drafting
    from draftsmith.infer.measure.plan.shapes import choose_device, choose_dtype, load_config, parse_shapes
    from draftsmith.infer.measure.plan.survey import SurveyRequest

    config = load_config(given["target"])
    drafting = [Drafting.chain(length) for length in numbers("lengths", given["lengths"])]
    drafting += [Drafting.parse_tree(word) for word in words(given["trees"])]
    asked = SurveyRequest(
        numbers("batch_sizes", given["batch_sizes"]),
        numbers("contexts", given["contexts"]),
        sorted({one.nodes for one in drafting}),
        shapes=parse_shapes(words(given["shapes"]), config),
        estimated=parse_shapes(words(given["estimate"]), config) if given["estimate"] else [],
    )
    return config, choose_dtype(config, given["dtype"]), choose_device(given["device"]), asked, drafting


def words(text: str) -> list[str]:
    """The words of a list with commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(name: str, given: Sequence[int]) -> list[int]:
    """Ascending, each once."""
    if not given or min(given) < 1:
        raise ValueError(f"--{name} takes numbers from 1 on, such as 1,8,32, not {list(given)}")
    return sorted(set(given))


def _check_place(name: str | None) -> None:
    """Minutes of measuring are not to end at a folder that is not there."""
    if name and (Path(name).is_dir() or not Path(name).resolve().parent.is_dir()):
        raise ValueError(f"{name} cannot be written: it is a folder, or lies in one that is not there")


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
