"""`draftsmith plan`: which draft would pay for this target on this machine, before training one."""

from __future__ import annotations

from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Any

from draftsmith.recipes.cli.ranges import FloatFrom0, IntFrom1


def plan(
    *,
    target: str,
    batch_sizes: Sequence[IntFrom1] = (1, 8, 32),
    contexts: Sequence[IntFrom1] = (128, 1024),
    shapes: str = "",
    estimate: str = "",
    lengths: Sequence[IntFrom1] = (1, 2, 3, 4, 6, 8, 12, 16),
    trees: str = "14x4,30x6",
    acceptance: str = "",
    tree_acceptance: str = "",
    forecast: str = "",
    context: IntFrom1 | None = None,
    dtype: str = "auto",
    device: str = "auto",
    machine: str = "",
    training_tokens: IntFrom1 = 100_000_000,
    seconds: FloatFrom0 = 600.0,
    out: str | None = None,
    plot: str | None = None,
    json: bool = False,
) -> None:
    """Time draft shapes and verification on this machine, with random weights, and rank shapes and draft lengths.

    With --machine nothing is timed: passes are modelled from the target's config and that machine's published figures.

    Example: draftsmith plan --target TARGET --acceptance 0.7

    Args:
        target: folder, Hub name or config.json; only the config and the tokenizer are read.
        batch_sizes: rows decoded together.
        contexts: context lengths at which passes are timed; costs at other lengths come from a fit.
        shapes: draft shapes to time: LAYERSxWIDTH or LAYERSxWIDTHxHEADS, and heads: eagle, eagle:32000 (tokens of
            its draft vocabulary), medusa:4, hydra:4, mtp; by default 1, 2, 3 and 5 layers of the target's width, and 2
            and 4 of half of it.
        estimate: shapes whose costs are estimated from the timed ones.
        lengths: lengths of drafted chains.
        trees: sizes of drafted trees: NODESxDEPTH, or the children of each node by depth, such as 4-2-1.
        acceptance: acceptance of a chain's tokens: a share (0.7), shares by depth (0.8,0.7,0.6), or a result of bench
            or replay as FILE or FILE:DRAFTER. Without it, shapes are ranked by the acceptance that they need.
        tree_acceptance: the same for trees: the share of steps that get from one depth to the next.
        forecast: file of `draftsmith forecast --out`: also show which length, tree and rule of that draft would pay at
            which batch size. The shape of the draft is timed as well, or alone if no shapes are given.
        context: context length of the tables; by default the mean of contexts, and for a forecast that of its texts.
        dtype: type of the weights; auto takes the config's.
        device: auto takes CUDA if there is a device.
        machine: model pass costs instead of timing them: h100, a100, l40s, rtx4090, cpu (this one, its constants are
            measured in seconds) or FILE.yaml with the same figures. Every result is marked as modelled.
        training_tokens: tokens of training data, to estimate the hours of training.
        seconds: time limit for timing passes, which takes most of the time; it ends earlier if all were timed nine
            times (those above the median three to nine times). Models, the loop and training add a tenth or so.
        out: file to write the costs to, for `replay --latency`.
        plot: SVG file to plot speedup over length to.
        json: print one JSON object on the last line.
    """
    from draftsmith.infer.files.atomic import written_beside
    from draftsmith.infer.files.locations import check_writable
    from draftsmith.infer.measure import tables
    from draftsmith.infer.measure.forecast.outlook import load_forecast
    from draftsmith.infer.measure.plan.forecasts import check_forecast, forecast_shapes, priced_forecast, with_forecast
    from draftsmith.infer.measure.plan.modelled import machine_for, modelled_survey
    from draftsmith.infer.measure.plan.ranking import Wish, report
    from draftsmith.infer.measure.plan.survey import survey
    from draftsmith.infer.measure.plan.tables import draw, plan_tables
    from draftsmith.infer.measure.predicted import parse_acceptance
    from draftsmith.recipes.cli.progress import progress

    chains = parse_acceptance(acceptance) if acceptance else None
    grown = parse_acceptance(tree_acceptance, trees=True) if tree_acceptance else None
    for name in filter(None, (out, plot)):
        check_writable(name)
        if not Path(name).resolve().parent.is_dir():
            raise ValueError(f"{name} cannot be written: its folder does not exist")
    if plot and Path(plot).suffix != ".svg":
        raise ValueError(f"--plot writes SVG: name a file that ends in .svg, not {plot}")
    known = load_forecast(forecast) if forecast else None
    config, kind, where, asked, drafting = _asked(locals())
    wish = Wish(drafting, context or sum(asked.contexts) // len(asked.contexts), chains, grown)
    names = {"name": target, "tokenizer": _tokenizer(target)}
    drafts = forecast_shapes(known, config) if known else {}
    if known:
        check_forecast(known, names["tokenizer"], forecast, target)
        asked = with_forecast(asked, known, drafts, alone=not shapes)
    if machine:
        found = modelled_survey(config, kind, machine_for(machine, config, kind), asked, **names)
    else:
        found = survey(config, kind, where, asked, seconds=seconds, say=progress, **names)
    ranking = report(found, wish, training_tokens)
    ranking["forecast"] = priced_forecast(found, known, drafts, context) if known else None
    if out:
        with written_beside(Path(out)) as file:
            file.write(dumps(found.costs().to_json(), indent=1) + "\n")
    if plot:
        draw(ranking, Path(plot))
    if json:
        print(dumps(ranking))
    else:
        tables.show(plan_tables(ranking))


def _tokenizer(target: str) -> str:
    """The fingerprint of the target's tokenizer; "" for a config alone."""
    from draftsmith.infer.text.tokenizer import TOKENIZER_FILES, load_tokenizer, tokenizer_fingerprint

    folder = Path(target).expanduser()
    if folder.is_file() or (folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES)):
        return ""
    try:
        return tokenizer_fingerprint(load_tokenizer(target))
    except ValueError:
        if folder.is_dir():
            raise
        return ""  # a Hub name of which only the config can be had


def _asked(given: dict[str, Any]) -> tuple[Any, Any, Any, Any, list[Any]]:
    """Config, dtype, device, what to time, and the chains and trees to rank."""
    from draftsmith.infer.measure.forecast.drafting import Drafting
    from draftsmith.infer.measure.plan.head_shapes import CandidateHead
    from draftsmith.infer.measure.plan.shapes import SurveyRequest, choose_dtype, load_config, parse_shapes
    from draftsmith.infer.models.load import choose_device

    config = load_config(given["target"])
    drafting = [Drafting.chain(length) for length in numbers("lengths", given["lengths"])]
    drafting += [Drafting.parse_tree(word) for word in words(given["trees"])]
    named = words(given["shapes"])
    heads = [CandidateHead.parse(word) for word in named if CandidateHead.names(word)]
    models = [word for word in named if not CandidateHead.names(word)]
    shapes = parse_shapes(models, config)
    asked = SurveyRequest(
        numbers("batch_sizes", given["batch_sizes"]),
        numbers("contexts", given["contexts"]),
        sorted({one.nodes for one in drafting}),
        shapes=shapes[:1] if heads and not models else shapes,  # the loop is timed with one
        heads=list(dict.fromkeys(heads)),
        estimated=parse_shapes(words(given["estimate"]), config) if given["estimate"] else [],
    )
    return config, choose_dtype(config, given["dtype"]), choose_device(given["device"]), asked, drafting


def words(text: str) -> list[str]:
    """The items of a comma-separated list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(name: str, given: Sequence[int]) -> list[int]:
    """`given`, sorted and without duplicates."""
    if not given or min(given) < 1:
        raise ValueError(f"--{name} takes numbers of at least 1, such as 1,8,32, not {list(given)}")
    return sorted(set(given))
