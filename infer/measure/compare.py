"""Answer files against a base: speedup and equality, Spec-Bench's two reports in one.

Questions are matched by id, in any order. A missing, extra or duplicated question is a difference, a failed row an
error. Two speedups are given: ours, the ratio of all tokens over all seconds, with a paired bootstrap interval; and
Spec-Bench's, the ratio of the questions' mean rates. Both use the token counts in the files, on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from draftsmith.infer.measure.answer_files import Answer, Choice, read_answers, task_of
from draftsmith.infer.measure.bootstrap import difference_interval, ratio_interval, speedup_interval
from draftsmith.infer.measure.metrics import ratio
from draftsmith.infer.measure.run_folder import answer_paths

BASELINE = "plain"
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


def compare(base: str | Path, others: Sequence[str | Path], *, seed: int = 0) -> dict[str, Any]:
    """The report as JSON. `equal` and `total` are sums over all others; `speedup` is None for several others."""
    base_path, other_paths = resolve(Path(base), [Path(other) for other in others])
    base_answers = read_answers(base_path)
    reports = {
        name: compare_answers(base_answers, read_answers(path), seed=seed) | {"by_exit": _exits_of(path)}
        for name, path in other_paths.items()
    }
    only = next(iter(reports.values())) if len(reports) == 1 else None
    return {
        "base": str(base_path),
        "equal": sum(report["equal"] for report in reports.values()),
        "total": sum(report["total"] for report in reports.values()),
        "speedup": only["speedup"] if only else None,
        "speedup_interval": only["speedup_interval"] if only else None,
        "others": reports,
    }


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


def compare_answers(base: Sequence[Answer], other: Sequence[Answer], *, seed: int = 0) -> dict[str, Any]:
    """One file against the base: equality, speed and accepted_length, over all and by task."""
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
            paired.append(Pair(mine[0], theirs[0]))
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
    """A question answered in both files."""

    base: Answer
    other: Answer


def speed(pairs: Sequence[Pair], *, seed: int) -> dict[str, Any]:
    """Speed over the pairs timed in both files, and the accepted_length of each side."""
    timed = [pair for pair in pairs if pair.base.timed and pair.other.timed]
    tokens, seconds = [pair.other.tokens for pair in timed], [pair.other.seconds for pair in timed]
    base_tokens, base_seconds = [pair.base.tokens for pair in timed], [pair.base.seconds for pair in timed]
    rate, base_rate = ratio(sum(tokens), sum(seconds)), ratio(sum(base_tokens), sum(base_seconds))
    return {
        "pairs": len(timed),
        "speedup": ratio(rate, base_rate),
        "speedup_interval": speedup_interval(tokens, seconds, base_tokens, base_seconds, seed=seed),
        "tokens_per_s": rate,
        "base_tokens_per_s": base_rate,
        "spec_bench": _spec_bench(timed, seed),
        **_accepted_lengths(timed, seed),
    }


def _spec_bench(timed: Sequence[Pair], seed: int) -> dict[str, Any]:
    """Spec-Bench's speedup: the mean over questions of tokens/s, over the base's mean."""
    rates = [pair.other.tokens / pair.other.seconds for pair in timed]
    base_rates = [pair.base.tokens / pair.base.seconds for pair in timed]
    mean, base_mean = ratio(sum(rates), len(rates)), ratio(sum(base_rates), len(base_rates))
    ones = [1.0] * len(timed)
    return {
        "speedup": ratio(mean, base_mean),
        "speedup_interval": speedup_interval(rates, ones, base_rates, ones, seed=seed),
        "tokens_per_s": mean,
        "base_tokens_per_s": base_mean,
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
