"""What would pay at which batch size: of all chains and trees that were forecast, the fastest of each rule.

A forecast has accepted_lengths; pass costs add `predicted` to each of its rows, by batch size. Its file can be priced
again with other costs (`plan`) and be shown in a report.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.infer.files.atomic import load_versioned
from draftsmith.infer.measure.forecast.drafting import Drafting
from draftsmith.infer.measure.predicted import Prediction

FORMAT, KIND = 1, "forecast"
WRITTEN_BY = "`draftsmith forecast --out`"
# Beside the rules.
TREES = "tree"
# Of a run folder that has one.
NAME = "forecast.json"

# (drafter, way to draft, rows, context) -> seconds of a plain step and of one with drafts.
Price = Callable[[str, Drafting, int, float], tuple[float, float]]


def rows_of(results: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(drafter, rule, row) of every chain and tree."""
    for name, by_rule in results["drafters"].items():
        for rule, rows in by_rule.items():
            for row in rows:
                yield name, rule, row
    for name, rows in results["trees"].items():
        for row in rows:
            yield name, TREES, row


def fastest(batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each batch size's rules the one with the largest speedup."""
    found = []
    for batch in batches:
        rule, cell = max(batch["rules"].items(), key=lambda item: float(item[1]["speedup"]))
        found.append({"batch_size": batch["batch_size"], "rule": rule, **cell})
    return found


def outlook(results: Mapping[str, Any], batch_sizes: Sequence[int]) -> list[dict[str, Any]]:
    """By batch size: plain decoding's tokens/s and, of each rule, the draft of the largest predicted speedup."""
    found = []
    for at, batch_size in enumerate(batch_sizes):
        best: dict[str, dict[str, Any]] = {}
        plain_s = 0.0
        for name, rule, row in rows_of(results):
            cell = _cell(name, row, row["predicted"][at])
            plain_s = plain_s or float(row["predicted"][at]["plain_step_s"])
            if rule not in best or cell["speedup"] > best[rule]["speedup"]:
                best[rule] = cell
        found.append({"batch_size": batch_size, "plain_tokens_per_s": batch_size / plain_s, "rules": best})
    return found


def _cell(name: str, row: Mapping[str, Any], predicted: Mapping[str, Any]) -> dict[str, Any]:
    """The interval of the speedup is that of the accepted_length: costs are taken as given."""
    per_token = predicted["speedup"] / row["accepted_length"]
    interval = row["accepted_length_interval"]
    return {
        "drafter": name,
        "draft": row["draft"],
        "accepted_length": row["accepted_length"],
        "accepted_length_interval": interval,
        "speedup": predicted["speedup"],
        "speedup_interval": None if interval is None else [per_token * end for end in interval],
        "tokens_per_s": predicted["batch_size"] * row["accepted_length"] / predicted["step_s"],
    }


def priced(results: Mapping[str, Any], batch_sizes: Sequence[int], price: Price) -> dict[str, Any]:
    """The forecast with other costs: `price` gives the seconds of each step."""
    again = json.loads(json.dumps(dict(results)))
    for name, _, row in rows_of(again):
        drafting = Drafting.parse(row["draft"])
        row["predicted"] = [
            Prediction(rows, row["accepted_length"], *price(name, drafting, rows, row["context"])).to_json()
            for rows in batch_sizes
        ]
    batches = outlook(again, batch_sizes)
    return again | {"best": fastest(batches), "by_batch_size": batches}


def load_forecast(path: str | Path) -> dict[str, Any]:
    """A file of `draftsmith forecast --out`; ValueError in one line for any other."""
    return load_versioned(path, KIND, FORMAT, _checked, WRITTEN_BY)


def _checked(value: dict[str, Any]) -> dict[str, Any]:
    for name, _, row in rows_of(value):
        Drafting.parse(row["draft"])
        float(row["accepted_length"]), float(row["context"]), value["shapes"][name]
    return value


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a report shows of a forecast. `source`: texts and costs, in a few words."""

    source: str
    batches: Sequence[Mapping[str, Any]]

    @property
    def rules(self) -> list[str]:
        return list(dict.fromkeys(rule for batch in self.batches for rule in batch["rules"]))

    @classmethod
    def load(cls, path: str | Path) -> Outlook:
        """From `draftsmith forecast --out`, or the JSON line of `draftsmith plan --forecast --json`."""
        text = _text(Path(path))
        try:
            value = _json(text)
            value = value.get("forecast") or value
            batches = value["by_batch_size"]
            if value.get("kind") != KIND:
                raise KeyError(KIND)
        except (ValueError, KeyError, AttributeError):
            raise ValueError(
                f"{path} is no forecast: write one with `draftsmith forecast --latency COSTS --out FILE`"
            ) from None
        if not batches:
            raise ValueError(
                f"{path} has accepted_lengths and no speeds: add --latency COSTS to `draftsmith forecast`, or give "
                "the file to `draftsmith plan --forecast FILE --json`"
            )
        return cls(source_of(value), batches)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as problem:
        raise ValueError(f"{path} cannot be read: {problem.strerror}") from problem


def _json(text: str) -> Any:
    """The JSON of a file, or of the last line of one that ends with it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return json.loads((text.splitlines() or [""])[-1])


def source_of(results: Mapping[str, Any]) -> str:
    """The texts and the costs behind the figures."""
    where = results["modelled"] or f"costs: {results['costs']}"
    return f"{results['texts']} answers, {results['tokens']} tokens, {how_drawn(results['sampling'])}; {where}"


def how_drawn(sampling: Mapping[str, Any]) -> str:
    if not sampling["temperature"]:
        return "greedy"
    how = f"drawn at temperature {sampling['temperature']:g}"
    how += f", top_k {sampling['top_k']}" if sampling["top_k"] else ""
    return how + (f", top_p {sampling['top_p']:g}" if sampling["top_p"] < 1 else "")
