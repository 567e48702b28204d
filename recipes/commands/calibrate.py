"""`draftsmith calibrate`: what a draft's confidence is worth for this target, and what passes cost on this machine."""

from __future__ import annotations

import sys
from json import dumps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from draftsmith.infer.measure.calibrate.answers import Answered
    from draftsmith.infer.measure.calibrate.fit import Calibrated


def calibrate(
    *,
    target: str,
    drafters: str,
    data: list[str],
    exits: list[int] | None = None,
    max_new_tokens: int = 96,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    min_distinct: float = 0.0,
    seconds: float = 60.0,
    template: str = "chat",
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    out: str | None = None,
    json: bool = False,
) -> None:
    """Measure confidence against acceptance on held-out prompts, and the costs of passes; keep both for decoding.

    Curves go to calibration/ in each draft's own folder, one file per target; costs to this machine's cache.

    Example: draftsmith calibrate --target DIR --drafters sd2:DRAFT,rest:STORE --data held_out.jsonl

    Args:
        target: folder or Hub name of the model that drafts are judged by.
        drafters: comma-separated, such as sd2:MODEL,small:MODEL,rest:STORE.
        data: prompts that no draft was trained on: files, folders or `datasets` names.
        exits: only these exits of drafts that have several.
        max_new_tokens: limit of each answer.
        temperature: that will be decoded with; 0 is greedy.
        top_k: sampling among so many tokens.
        top_p: sampling within so much probability.
        batch_size: answers decoded together.
        limit: so many prompts and no more.
        min_distinct: leave out answers with a smaller share of distinct 4-grams: those that loop.
        seconds: that timing the passes may take; 0 leaves costs alone.
        template: how messages become a prompt.
        dtype: of the target's weights.
        device: where the target runs.
        seed: of sampling, and of which prompts are fitted to.
        out: a new folder for the results and a reliability plot per source.
        json: print one JSON object on the last line instead of tables.
    """
    config = dict(locals())
    from draftsmith.infer.contract.row import Stops
    from draftsmith.infer.contract.sampling import resolve_settings
    from draftsmith.infer.files.provenance import provenance
    from draftsmith.infer.measure import tables
    from draftsmith.infer.measure.calibrate import fit as calibration
    from draftsmith.infer.measure.calibrate.costs import measure_costs
    from draftsmith.infer.measure.calibrate.reliability import check_plots
    from draftsmith.infer.measure.calibrate.tables import calibration_tables, results
    from draftsmith.infer.measure.run_folder import RunFolder
    from draftsmith.infer.models.load import load_target
    from draftsmith.recipes.cli.drafters import parse_drafters

    chosen = parse_drafters(drafters)
    if not chosen:
        raise ValueError("give --drafters, such as sd2:MODEL or rest:STORE")
    if out:
        check_plots()
    folder = RunFolder.create(out) if out else None
    loaded = load_target(target, dtype=dtype, device=device)
    for drafter in chosen.values():
        drafter.bind(loaded)
    calibration.check_homes(chosen, loaded)
    own = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    settings = resolve_settings(loaded.generation_config, **own)
    stops = Stops(max_new_tokens, loaded.eos_ids)
    answers, left_out = _answers(loaded, config, settings, stops)
    fit_on = calibration.halves(answers, seed)
    found: dict[str, Calibrated] = {}
    for label, drafter in chosen.items():
        tell = _progress(label, "answers read")
        found[label] = calibration.calibrate(
            drafter, loaded, answers, fit_on, settings, stops, exits=exits, progress=tell
        )
    files = calibration.save(found, loaded)  # kept, whatever the timing comes to
    if seconds > 0:
        print(f"passes are timed for up to {seconds:g} s", file=sys.stderr)
        for label, (costs, error) in measure_costs(loaded, chosen, answers, seconds=seconds).items():
            found[label].costs, found[label].cost_error = costs, error
        files = calibration.save(found, loaded)
    told = results(
        found, files, prompts=len({one.number for one in answers}), answers=len(answers), left_out=left_out,
        tokens=sum(len(one.answer) for one in answers), temperature=temperature,
    )  # fmt: skip
    if folder:
        folder.write_run(provenance(sys.argv, config, seed) | {"sampling": settings.to_json()})
        _write(folder.path, found, told)
    if json:
        print(dumps(told, ensure_ascii=False))
    else:
        tables.show(calibration_tables(told))


def _answers(loaded: Any, config: dict[str, Any], settings: Any, stops: Any) -> tuple[list[Answered], int]:
    """The target's answers, and how many were left out because they loop."""
    from draftsmith.infer.measure.calibrate.answers import answer_prompts, without_loops
    from draftsmith.infer.text.templates import find_template
    from draftsmith.recipes.cli.questions import read_questions

    records = read_questions(config["data"], config["limit"])
    template = find_template(config["template"], loaded.tokenizer)
    tell = _progress("target", "answers written")
    answers = answer_prompts(loaded, records, template, settings, stops, batch_size=config["batch_size"], progress=tell)
    kept = without_loops(answers, config["min_distinct"])
    return kept, len(answers) - len(kept)


def _write(path: Any, found: dict[str, Calibrated], told: dict[str, Any]) -> None:
    from draftsmith.infer.files.atomic import write_json
    from draftsmith.infer.measure.calibrate.fit import apply_curves, plot_names
    from draftsmith.infer.measure.calibrate.reliability import draw_reliability

    for (label, source), name in plot_names(found).items():
        seen, curves = found[label].held_out[source], found[label].calibration
        shown = (curves.curves[source], curves.of(source, 0))
        draw_reliability(source, seen, apply_curves(source, curves.curves, seen), shown, path / name)
    write_json(path / "results.json", told)


def _progress(label: str, what: str) -> Callable[[int, int], None]:
    from draftsmith.recipes.cli.progress import progress

    def tell(done: int, total: int) -> None:
        if done == total or done % 10 == 0:
            progress(f"{label}: {done}/{total} {what}", last=done == total)

    return tell
