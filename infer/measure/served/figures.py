"""The results of a load as JSON: the same keys for every server and every number of concurrent requests.

tokens/s is the tokens of all answers over wall time. Its interval is that of tokens per second of a request, times the
mean number of requests in flight. TTFT is the wait for the first text of each answer, TPOT the seconds per token after
it. Tokens are those that the server counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from draftsmith.infer.measure.bootstrap import (
    Interval,
    quantile,
    quantile_interval,
    ratio_interval,
    speedup_interval,
)
from draftsmith.infer.measure.metrics import ratio
from draftsmith.infer.measure.served.load import ServedAnswer, ServedLevel, ServedLoad

QUANTILES = {"p50": 0.5, "p95": 0.95}
# A server that generated more than this times our tokens answered somebody else as well.
OTHERS = 1.02

Answers = Sequence[Sequence[ServedAnswer]]


def summarise_load(load: ServedLoad, servers: dict[str, dict[str, Any]], baseline: str | None = None) -> dict[str, Any]:
    """The results. `servers`: what is known of each by name; `baseline`: the one that drafts nothing."""
    levels = []
    for at, level in enumerate(next(iter(load.levels.values()))):
        found = {name: figures(own[at], load.seed) for name, own in load.levels.items()}
        if baseline is not None:
            for name, own in load.levels.items():
                found[name] |= beside(own[at], load.levels[baseline][at], load.seed)
        levels.append({"concurrency": level.concurrency, "servers": found})
    kinds = {name: own[-1].counts for name, own in load.levels.items()}
    return {
        "servers": {
            name: facts | {"kind": kinds[name].kind, "metrics_problem": kinds[name].problem}
            for name, facts in servers.items()
        },
        "baseline": baseline,
        "levels": levels,
        "questions": len(load.questions),
        "repeats": load.repeats,
        "seed": load.seed,
    }


def figures(level: ServedLevel, seed: int) -> dict[str, Any]:
    """All figures of one server at one number of concurrent requests; None for those that cannot be computed."""
    groups = [good for several in level.answers.values() if (good := [one for one in several if not one.error])]
    tokens, seconds = _tokens(groups), _seconds(groups)
    in_flight = ratio(sum(seconds), level.wall_s)
    failed = [(key, one.error) for key, several in level.answers.items() for one in several if one.error]
    turns = [[turn for one in several for turn in one.turns] for several in groups]
    waits = {
        "ttft": [[turn.first_s for turn in own] for own in turns],
        "tpot": [
            [(turn.last_s - turn.first_s) / (turn.tokens - 1) for turn in own if turn.tokens > 1] for own in turns
        ],
        "answer": [[turn.last_s for turn in own] for own in turns],
    }
    found: dict[str, Any] = {
        "tokens_per_s": ratio(sum(tokens), level.wall_s),
        "tokens_per_s_interval": _times(ratio_interval(tokens, seconds, seed=seed), in_flight),
        "in_flight": in_flight,
        "requests": sum(map(len, turns)),
        "tokens": sum(tokens),
        "prompt_tokens": sum(turn.prompt_tokens for own in turns for turn in own),
        "wall_s": level.wall_s,
        "errors": len(failed),
        "error_list": [{"question_id": key, "error": error} for key, error in failed],
    }
    for name, values in waits.items():
        for label, share in QUANTILES.items():
            found[f"{name}_{label}_s"] = quantile(values, share)
            found[f"{name}_{label}_s_interval"] = quantile_interval(values, share, seed=seed)
    found |= _drafts(level, sum(tokens), bool(failed))
    cached = [turn.cached for own in turns for turn in own]
    if cached and None not in cached:  # better than the server's counters: of our prompts alone
        found["cached_share"] = ratio(sum(one or 0 for one in cached), found["prompt_tokens"])
    return found


def _drafts(level: ServedLevel, tokens: int, failed: bool) -> dict[str, Any]:
    """What the server's own counters say of this load."""
    drafters = level.counts.drafters()
    generated = level.counts.total("tokens")
    return {
        "accepted_length": next(iter(drafters.values()))["accepted_length"] if len(drafters) == 1 else None,
        "drafters": drafters,
        "cached_share": level.counts.cached_share,
        "others_tokens": max(generated - tokens, 0) if generated and not failed and generated > OTHERS * tokens else 0,
    }


def beside(level: ServedLevel, base: ServedLevel, seed: int) -> dict[str, Any]:
    """Speedup over the server without drafts, over the questions that neither failed, and how many texts are equal."""
    both = [(own, base.answers[key]) for key, own in level.answers.items()]
    pairs = [(own, plain) for own, plain in both if not any(one.error for one in (*own, *plain))]
    own, plain = [one for one, _ in pairs], [one for _, one in pairs]
    flights = [ratio(sum(_seconds(list(each.answers.values()))), each.wall_s) for each in (level, base)]
    scale = ratio(*flights)
    columns = _tokens(own), _seconds(own), _tokens(plain), _seconds(plain)
    rates = [ratio(sum(tokens), sum(seconds)) for tokens, seconds in (columns[:2], columns[2:])]
    speedup = ratio(*rates)
    return {
        "speedup": None if speedup is None or scale is None else speedup * scale,
        "speedup_interval": _times(speedup_interval(*columns, seed=seed), scale),
        "equal": sum(_texts(one) == _texts(other) for one, other in pairs),
        "total": len(pairs),
    }


def _texts(several: Sequence[ServedAnswer]) -> list[list[str]]:
    return [[turn.text for turn in one.turns] for one in several]


def _tokens(groups: Answers) -> list[int]:
    return [sum(one.tokens for one in several) for several in groups]


def _seconds(groups: Answers) -> list[float]:
    return [sum(one.seconds for one in several) for several in groups]


def _times(interval: Interval, factor: float | None) -> Interval:
    return None if interval is None or factor is None else (interval[0] * factor, interval[1] * factor)
