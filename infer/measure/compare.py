"""Answer files against a base: speedup and equality, Spec-Bench's two reports in one.

Questions are matched by id, in any order. A missing, extra or duplicated question is a difference, a failed row an
error. Two speedups are given: ours, the ratio of all tokens over all seconds, with a paired bootstrap interval; and
Spec-Bench's, the ratio of the questions' mean rates. Both use the token counts in the files, on both sides.

Wall clocks of two runs also compare their machines and loads. So the speedup of two run folders is a ratio of ratios:
each file over plain decoding of its own run. Runs of different targets or prompts are refused, other differences are
warnings. Files outside run folders (Spec-Bench's own) have no plain decoding: their wall clocks are compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from draftsmith.infer.measure.answer_files import Answer, Choice, read_answers, task_of
from draftsmith.infer.measure.bootstrap import difference_interval, rates_interval, ratio_interval
from draftsmith.infer.measure.metrics import ratio
from draftsmith.infer.measure.run_folder import RunFacts, answer_paths

BASELINE = "plain"
# What a speedup is a ratio of: two speeds of one run, two speedups over each run's own plain, or two wall clocks.
SAME_RUN, OWN_PLAIN, WALL_CLOCK = "same_run", "own_plain", "wall_clock"
PlainAnswers = tuple[Mapping[str, list[Answer]] | None, Mapping[str, list[Answer]] | None] | None
# Characters of text shown on either side of a difference.
CONTEXT = 24


def first_difference(one: Sequence[Any], other: Sequence[Any]) -> int | None:
    """The first index at which the two differ (one may have ended there), or None if they are equal."""
    if one == other:
        return None
    for index, (mine, theirs) in enumerate(zip(one, other)):
        if mine != theirs:
            return index
    return min(len(one), len(other))


def token_difference(base: Sequence[int], other: Sequence[int]) -> dict[str, Any] | None:
    """The index and the two tokens there; None is the token of an answer that had already ended."""
    index = first_difference(list(base), list(other))
    if index is None:
        return None
    tokens = (ids[index] if index < len(ids) else None for ids in (base, other))
    return {"by": "token_ids", "index": index} | dict(zip(("base", "other"), tokens))


def text_difference(base: str, other: str) -> dict[str, Any] | None:
    """The index of the first differing character, with some of both texts around it."""
    index = first_difference(base, other)
    if index is None:
        return None
    around = slice(max(0, index - CONTEXT), index + CONTEXT)
    return {"by": "text", "index": index, "base": base[around], "other": other[around]}


@dataclass(frozen=True, slots=True)
class Side:
    """An answer file, its run, and the plain answers of that run by question; both missing outside a run folder."""

    path: Path
    answers: list[Answer]
    run: RunFacts | None
    plain: Mapping[str, list[Answer]] | None

    @classmethod
    def read(cls, path: Path) -> Side:
        run = RunFacts.around(path)
        plain = answer_paths(run.folder).get(BASELINE) if run else None
        return cls(path, read_answers(path), run, _by_id(read_answers(plain)) if plain else None)


def compare(base: str | Path, others: Sequence[str | Path], *, seed: int = 0) -> dict[str, Any]:
    """The report as JSON. `equal` and `total` are sums over all others; `speedup` is None for several others."""
    base_path, other_paths = resolve(Path(base), [Path(other) for other in others])
    base_side = Side.read(base_path)
    reports, warnings = {}, []
    for name, path in other_paths.items():
        side = Side.read(path)
        speedup_of, unlike = speedup_basis(base_side, side)
        own_plain = (base_side.plain, side.plain) if speedup_of == OWN_PLAIN else None
        found = compare_answers(base_side.answers, side.answers, plain=own_plain, seed=seed)
        reports[name] = found | {"by_exit": _exits_of(path), "speedup_of": speedup_of, "unlike": unlike}
        warnings += basis_warnings(base_side, side, speedup_of, unlike)
    only = next(iter(reports.values())) if len(reports) == 1 else None
    return {
        "base": str(base_path),
        "equal": sum(report["equal"] for report in reports.values()),
        "total": sum(report["total"] for report in reports.values()),
        "speedup": only["speedup"] if only else None,
        "speedup_interval": only["speedup_interval"] if only else None,
        "speedup_of": only["speedup_of"] if only else None,
        "warnings": list(dict.fromkeys(warnings)),
        "others": reports,
    }


def speedup_basis(base: Side, other: Side) -> tuple[str, dict[str, list[str]]]:
    """(what the speedup is a ratio of, settings that differ); ValueError for runs of different targets or prompts."""
    mine, theirs = base.run, other.run
    if mine and theirs and mine.folder == theirs.folder:
        return SAME_RUN, {}
    if not (mine and theirs):
        return WALL_CLOCK, {}
    if mine.facts and theirs.facts and not mine.has_target_of(theirs):
        names = f"{mine.target}, {theirs.target}" if mine.target != theirs.target else f"two at {mine.target}"
        raise ValueError(f"{mine.folder} and {theirs.folder} are runs of different targets: {names}")
    _check_prompts(mine, theirs)
    one, two = (run.settings if run.facts else {} for run in (mine, theirs))
    unlike = {
        key: [one.get(key, "not set"), two.get(key, "not set")]
        for key in {**one, **two}
        if one and two and one.get(key) != two.get(key)
    }
    return OWN_PLAIN if base.plain and other.plain else WALL_CLOCK, unlike


def _check_prompts(base: RunFacts, other: RunFacts) -> None:
    """Refuse runs that share no question, or ask something else under one id."""
    mine, theirs = base.questions, other.questions
    if not (mine and theirs):
        return
    shared = [key for key in mine if key in theirs]
    if not shared:
        raise ValueError(f"{base.folder} and {other.folder} have no question in common")
    if changed := [key for key in shared if mine[key] != theirs[key]]:
        raise ValueError(
            f"{base.folder} and {other.folder} have different prompts: {len(changed)} of {len(shared)} shared "
            f"questions are worded differently, {changed[0]} is the first"
        )


def basis_warnings(base: Side, other: Side, speedup_of: str, unlike: Mapping[str, Sequence[str]]) -> list[str]:
    """What a reader must know before reading the speedups."""
    if speedup_of == SAME_RUN:
        return []
    warnings = [
        f"different {key}: {before} in {base.run.folder.name}, {here} in {other.run.folder.name}"
        for key, (before, here) in unlike.items()
        if base.run and other.run
    ]
    warnings += [
        f"{side.run.folder} has no run.json: its target and settings are unknown"
        for side in (base, other)
        if side.run and not side.run.facts
    ]
    if speedup_of == WALL_CLOCK:
        warnings.append(
            "the speedups of answer files from different runs are ratios of wall clocks: they also compare the "
            "machines, their loads and the settings"
        )
    return warnings


def _exits_of(path: Path) -> dict[str, int]:
    """The exits that a drafter used, read from the results of the run folder that its answers are in."""
    results = path.parent.parent / "results.json"
    if path.parent.name != "answers" or not results.is_file():
        return {}
    drafters = json.loads(results.read_text(encoding="utf-8")).get("drafters", {})
    return drafters.get(unquote(path.name.removesuffix(".jsonl")), {}).get("by_exit", {})


def resolve(base: Path, others: Sequence[Path]) -> tuple[Path, dict[str, Path]]:
    """The base file and the others by name. A run folder as the base means its plain answers, as another all of them.

    Without others, the drafters of a run folder are compared with its plain answers.
    """
    for path in (base, *others):
        if not path.exists():
            raise ValueError(f"{path}: no such answer file or run folder")
        if path.is_dir() and not answer_paths(path):
            raise ValueError(f"{path} is no run folder: it has no answers/*.jsonl")
    if base.is_dir() and BASELINE not in answer_paths(base):
        raise ValueError(f"{base}: no answers/{BASELINE}.jsonl to compare with; name the file to use as the base")
    base_path = answer_paths(base)[BASELINE] if base.is_dir() else base
    if not others and not base.is_dir():
        raise ValueError(f"{base}: nothing to compare it with; name one more answer file or run folder")
    found: dict[str, Path] = {}
    for other in others or [base]:
        if not other.is_dir():
            found[str(other)] = other
            continue
        for name, path in answer_paths(other).items():
            if path.resolve() != base_path.resolve():
                found[name if len(others) <= 1 else f"{other}/{name}"] = path
    if not found:
        raise ValueError(f"{base} holds only {BASELINE} answers: there is nothing to compare them with")
    return base_path, found


def compare_answers(
    base: Sequence[Answer], other: Sequence[Answer], *, plain: PlainAnswers = None, seed: int = 0
) -> dict[str, Any]:
    """One file against the base: equality, speed and accepted_length, over all and by task.

    `plain`: the plain answers of the base's run and of the other's, which their speeds are divided by.
    """
    base_by_id, other_by_id = _by_id(base), _by_id(other)
    ids = list(dict.fromkeys([*base_by_id, *other_by_id]))
    differences, errors, equal, paired = [], [], 0, []
    for key in ids:
        mine, theirs = base_by_id.get(key, []), other_by_id.get(key, [])
        shown = (mine or theirs)[0].question_id
        found = _count_difference(mine, theirs)
        if found is None:
            failed = {"base": mine[0].error, "other": theirs[0].error}
            if any(failed.values()):
                errors.append({"question_id": shown} | {side: text for side, text in failed.items() if text})
                continue
            alone = [one.get(key, []) for one in plain or () if one]
            paired.append(Pair(mine[0], theirs[0], [one[0] if len(one) == 1 else None for one in alone]))
            found = answer_difference(mine[0], theirs[0])
        equal += found is None
        differences += [] if found is None else [{"question_id": shown} | found]
    report: dict[str, Any] = {"equal": equal, "total": len(ids), "errors": len(errors)}
    report |= speed(paired, seed=seed)
    tasks = list(dict.fromkeys(task_of(pair.base.category) for pair in paired))
    report["by_category"] = {
        task: speed([pair for pair in paired if task_of(pair.base.category) == task], seed=seed) for task in tasks
    }
    return report | {"differences": differences, "error_list": errors}


def _by_id(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """Ids are compared as text: 81 and "81" are the same question."""
    found: dict[str, list[Answer]] = {}
    for answer in answers:
        found.setdefault(str(answer.question_id), []).append(answer)
    return found


def _count_difference(base: Sequence[Answer], other: Sequence[Answer]) -> dict[str, Any] | None:
    if not other:
        return {"by": "missing"}
    if not base:
        return {"by": "extra"}
    if len(base) > 1 or len(other) > 1:
        return {"by": "duplicated", "base": len(base), "other": len(other)}
    return None


def answer_difference(base: Answer, other: Answer) -> dict[str, Any] | None:
    """The first difference in any choice and turn, or None."""
    if len(base.choices) != len(other.choices):
        return {"by": "choices", "base": len(base.choices), "other": len(other.choices)}
    for choice, (mine, theirs) in enumerate(zip(base.choices, other.choices)):
        if len(mine.turns) != len(theirs.turns):
            return {"choice": choice, "by": "turns", "base": len(mine.turns), "other": len(theirs.turns)}
        for turn in range(len(mine.turns)):
            found = _turn_difference(mine, theirs, turn)
            if found is not None:
                return {"choice": choice, "turn": turn} | found
    return None


def _turn_difference(base: Choice, other: Choice, turn: int) -> dict[str, Any] | None:
    """By token ids if both have them, else by text."""
    in_text = text_difference(base.turns[turn], other.turns[turn])
    if not (base.token_ids and other.token_ids):
        return in_text
    found = token_difference(base.token_ids[turn], other.token_ids[turn])
    return found if found is None or in_text is None else found | {"text": in_text}


@dataclass(frozen=True, slots=True)
class Pair:
    """A question answered in both files; `plain` holds the plain answers of both runs, or nothing."""

    base: Answer
    other: Answer
    plain: Sequence[Answer | None] = ()

    @property
    def timed(self) -> bool:
        return all(answer is not None and answer.timed for answer in (self.base, self.other, *self.plain))


def speed(pairs: Sequence[Pair], *, seed: int) -> dict[str, Any]:
    """Speed over the pairs timed in both files, and the accepted_length of each side."""
    timed = [pair for pair in pairs if pair.timed]
    columns = {
        "other": [pair.other for pair in timed],
        "base": [pair.base for pair in timed],
        "base_plain": [pair.plain[0] for pair in timed if pair.plain and pair.plain[0]],
        "other_plain": [pair.plain[1] for pair in timed if pair.plain and pair.plain[1]],
    }
    sums = {name: ([one.tokens for one in own], [one.seconds for one in own]) for name, own in columns.items()}
    # As sums of rates over numbers of questions, Spec-Bench's mean rates have the same form.
    rates = {name: ([one.tokens / one.seconds for one in own], [1.0] * len(own)) for name, own in columns.items()}
    return (
        _speedup(sums, seed)
        | {"pairs": len(timed), "spec_bench": _speedup(rates, seed)}
        | _accepted_lengths(timed, seed)
    )


def _speedup(columns: Mapping[str, tuple[Sequence[float], Sequence[float]]], seed: int) -> dict[str, Any]:
    """The ratio of two rates or, with plain answers, of two speedups over plain, and its interval."""
    rate = {name: ratio(sum(tokens), sum(seconds)) for name, (tokens, seconds) in columns.items()}
    above, below = ["other"], ["base"]
    own = None
    if columns["other_plain"][0]:
        own = ratio(rate["other"], rate["other_plain"])
        above.append("base_plain")
        below.append("other_plain")
    speedup = ratio(own, ratio(rate["base"], rate["base_plain"])) if own else ratio(rate["other"], rate["base"])
    interval = rates_interval([columns[name] for name in above], [columns[name] for name in below], seed=seed)
    return {
        "speedup": speedup,
        "speedup_interval": interval,
        "tokens_per_s": rate["other"],
        "base_tokens_per_s": rate["base"],
        "over_own_plain": own,
    }


def _accepted_lengths(pairs: Sequence[Pair], seed: int) -> dict[str, Any]:
    """The mean of all accept_lengths, pooled as in Spec-Bench; the difference if both files have some."""
    own = [pair.other.accept_lengths for pair in pairs]
    base = [pair.base.accept_lengths for pair in pairs]
    sums, counts = [sum(lengths) for lengths in own], [len(lengths) for lengths in own]
    base_sums, base_counts = [sum(lengths) for lengths in base], [len(lengths) for lengths in base]
    both = sum(counts) > 0 and sum(base_counts) > 0
    return {
        "accepted_length": ratio(sum(sums), sum(counts)),
        "accepted_length_interval": ratio_interval(sums, counts, seed=seed) if sum(counts) else None,
        "base_accepted_length": ratio(sum(base_sums), sum(base_counts)),
        "accepted_length_difference_interval": (
            difference_interval(sums, counts, base_sums, base_counts, seed=seed) if both else None
        ),
    }
