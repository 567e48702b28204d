"""`draftsmith calibrate`: acceptance by confidence, for each draft with this target, and the cost of passes here."""

from __future__ import annotations

import sys
from json import dumps
from typing import TYPE_CHECKING, Any

from draftsmith.recipes.cli.ranges import Above0To1, FloatFrom0, From0To1, IntFrom0, IntFrom1

if TYPE_CHECKING:
    from collections.abc import Callable

    from draftsmith.infer.measure.calibrate.answers import Answered
    from draftsmith.infer.measure.calibrate.fit import Calibrated


def calibrate(
    *,
    target: str,
    drafters: str,
    data: list[str],
    exits: list[IntFrom1] | None = None,
    max_new_tokens: IntFrom1 = 96,
    temperature: FloatFrom0 | None = None,
    temperatures: list[FloatFrom0] | None = None,
    top_k: IntFrom0 | None = None,
    top_p: Above0To1 | None = None,
    batch_size: IntFrom1 = 8,
    limit: IntFrom1 | None = None,
    min_distinct: From0To1 = 0.0,
    seconds: FloatFrom0 = 60.0,
    template: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    tp: IntFrom1 = 1,
    seed: IntFrom0 = 0,
    out: str | None = None,
    json: bool = False,
) -> None:
    """Measure how often drafts of each confidence are accepted, and how long passes take; decoding uses both.

    Curves go to calibration/ in each draft's own folder, one file per target; pass costs go to this machine's cache.

    Example: draftsmith calibrate --target DIR --drafters sd2:DRAFT,rest:STORE --data held_out.jsonl

    Args:
        target: folder or Hub name of the target model.
        drafters: comma-separated, such as sd2:MODEL,small:MODEL,rest:STORE.
        data: prompts that no draft was trained on: files, folders or `datasets` names.
        exits: calibrate only these exits of a sorted draft.
        max_new_tokens: token limit of each answer.
        temperature: the temperature to calibrate for; 0 is greedy. By default 0, and the target's own sampling
            temperature if its generation config has one.
        temperatures: several temperatures to calibrate for.
        top_k: sample from this many of the likeliest tokens; 0 from all.
        top_p: sample from the likeliest tokens, up to this total probability.
        batch_size: answers decoded together.
        limit: read at most this many prompts.
        min_distinct: leave out answers that loop: those with a smaller share of distinct 4-grams.
        seconds: time limit for timing passes; 0 times none.
        template: prompt template: auto (chat, or plain without one), chat (the tokenizer's own), plain, a format with
            {prompt}, or a FastChat name.
        dtype: type of the target's weights, such as bfloat16.
        device: device of the target, such as cuda or cpu.
        tp: ranks that the target's weights are split over, with a device each; they are started for you. Drafts stay
            whole unless they ask for the same: small:DRAFT[tp=2].
        seed: random seed of sampling, and of the split into fitting and held-out prompts.
        out: a new folder for the results and a reliability plot per source.
        json: print one JSON object on the last line instead of tables.
    """
    config = dict(locals())
    from draftsmith.infer.contract.sampling import resolve_settings
    from draftsmith.infer.files.provenance import provenance
    from draftsmith.infer.measure import tables
    from draftsmith.infer.measure.calibrate import fit as calibration
    from draftsmith.infer.measure.calibrate.costs import measure_costs
    from draftsmith.infer.measure.calibrate.reliability import check_plots
    from draftsmith.infer.measure.calibrate.tables import calibration_tables, results
    from draftsmith.infer.measure.run_folder import RunFolder
    from draftsmith.infer.models.load import check_model, load_target
    from draftsmith.recipes.cli.inputs import parse_drafters, specs_by_label

    check_model(target, dtype, device, tp)
    folder = RunFolder.create(out) if out else None
    chosen = parse_drafters(drafters)
    if not chosen:
        raise ValueError("give --drafters, such as sd2:MODEL or rest:STORE")
    if out:
        check_plots()
    loaded = load_target(target, dtype=dtype, device=device, tp=tp)
    for drafter in chosen.values():
        drafter.bind(loaded)
    calibration.check_homes(chosen, loaded)
    asked = _temperatures(loaded, temperature, temperatures)
    own = {"top_k": top_k, "top_p": top_p, "seed": seed}
    by_temperature = {one: resolve_settings(loaded.generation_config, temperature=one, **own) for one in asked}
    stops = loaded.stops(max_new_tokens)
    found: dict[float, dict[str, Calibrated]] = {}
    everything: list[Answered] = []
    all_left_out = 0
    for one, settings in by_temperature.items():
        answers, left_out = _answers(loaded, config, settings, stops)
        everything, all_left_out = everything + answers, all_left_out + left_out
        fit_on = calibration.halves(answers, seed)
        found[one] = {}
        for label, drafter in chosen.items():
            progress = _progress(label, f"answers read at temperature {one:g}")
            found[one][label] = calibration.calibrate(
                drafter, loaded, answers, fit_on, settings, stops, exits=exits, progress=progress
            )
        files = calibration.save(found[one], loaded)  # before timing, which may fail
    first = found[asked[0]]
    if seconds > 0:
        print(f"timing passes for up to {seconds:g} s", file=sys.stderr)
        timed = measure_costs(loaded, chosen, everything, seconds=seconds, name=target)
        for label, (costs, error) in timed.items():
            first[label].costs, first[label].cost_error = costs, error
        files = calibration.save(first, loaded)
    summary = results(
        found, files, target=target, prompts=len({one.number for one in everything}), answers=len(everything),
        left_out=all_left_out, specs=specs_by_label(drafters, chosen),
        tokens=sum(len(one.answer) for one in everything),
    )  # fmt: skip
    if folder:
        sampling = [settings.to_json() for settings in by_temperature.values()]
        folder.write_run(provenance(sys.argv, config, seed) | {"sampling": sampling})
        _write(folder.path, found, summary)
    if json:
        print(dumps(summary, ensure_ascii=False))
    else:
        tables.show(calibration_tables(summary))


def _temperatures(loaded: Any, temperature: float | None, temperatures: list[float] | None) -> list[float]:
    """What was asked for, or greedy and the target's own sampling temperature."""
    from draftsmith.infer.contract.sampling import resolve_settings

    if temperature is not None and temperatures is not None:
        raise ValueError("give --temperature or --temperatures, not both")
    if temperatures == []:
        raise ValueError("--temperatures is empty: name at least one")
    asked = temperatures if temperatures is not None else [temperature] if temperature is not None else None
    if asked is None:
        asked = [0.0, resolve_settings(loaded.generation_config).temperature]
    return list(dict.fromkeys(map(float, asked)))


def _answers(loaded: Any, config: dict[str, Any], settings: Any, stops: Any) -> tuple[list[Answered], int]:
    """The target's answers without those that loop, and the number of those."""
    from draftsmith.infer.measure.calibrate.answers import answer_prompts, without_loops
    from draftsmith.infer.text.templates import find_template
    from draftsmith.recipes.cli.inputs import read_questions

    records = read_questions(config["data"], config["limit"])
    template = find_template(config["template"], loaded.tokenizer)
    config["template"] = template.name
    progress, size = _progress("target", "answers written"), config["batch_size"]
    answers = answer_prompts(loaded, records, template, settings, stops, batch_size=size, progress=progress)
    kept = without_loops(answers, config["min_distinct"])
    return kept, len(answers) - len(kept)


def _write(path: Any, found: dict[float, dict[str, Calibrated]], summary: dict[str, Any]) -> None:
    from draftsmith.infer.files.atomic import write_json
    from draftsmith.infer.measure.calibrate.fit import apply_curves, plot_names
    from draftsmith.infer.measure.calibrate.reliability import draw_reliability

    for number, (temperature, one) in enumerate(found.items()):
        for (label, source), name in plot_names(one).items():
            seen, curves = one[label].held_out[source], one[label].calibration
            shown = (curves.curves[source], curves.of(source, 0))
            file = path / (name if number == 0 else name.with_stem(f"{name.stem}-T{temperature:g}"))
            draw_reliability(source, seen, apply_curves(source, curves.curves, seen), shown, file)
    write_json(path / "results.json", summary)


def _progress(label: str, what: str) -> Callable[[int, int], None]:
    from draftsmith.recipes.cli.progress import progress

    return lambda done, total: progress(f"{label}: {done}/{total} {what}", last=done == total)
