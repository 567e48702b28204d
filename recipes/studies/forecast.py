"""Whether forecasts hold: `python -m draftsmith.recipes.studies.forecast --target T --drafts D1,D2 --data QUESTIONS`.

A cell is a draft, a temperature, a rule and a length of drawn chains. Its forecast comes from texts that plain decoding
drew with one seed, its loop decodes the same prompts with another. A cell agrees if 0 lies in the paired bootstrap
interval of the difference of the two accepted_lengths, drawn over prompts. A second forecast, from the very texts that
the loop drew, leaves only the noise of acceptance and shows a smaller error. Cells in OUT are not repeated.
"""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from dataclasses import dataclass, replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from draftsmith.infer.contract.protocols import Drafter
from draftsmith.infer.contract.row import Row
from draftsmith.infer.contract.sampling import Settings, resolve_settings
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.engine.logprobs import NotingRule
from draftsmith.infer.files.atomic import write_json
from draftsmith.infer.files.provenance import hardware
from draftsmith.infer.measure.bootstrap import difference_interval, ratio_interval
from draftsmith.infer.measure.forecast.drafts import check_draws
from draftsmith.infer.measure.forecast.forecast import DraftFigures, Forecast
from draftsmith.infer.measure.forecast.lengths import RULES, RuleName
from draftsmith.infer.measure.forecast.texts import DrawnText
from draftsmith.infer.measure.tables import number, show, table_of, with_interval
from draftsmith.infer.models.load import load_target
from draftsmith.infer.text.record import Message
from draftsmith.infer.text.templates import find_template
from draftsmith.recipes.cli.inputs import parse_drafters, read_questions
from draftsmith.recipes.cli.progress import progress
from draftsmith.recipes.studies import run_study

if TYPE_CHECKING:
    from draftsmith.infer.models.hf_target import HFTarget


def forecast(
    *,
    target: str,
    drafts: list[str],
    data: list[str],
    temperatures: Sequence[float] = (0.5, 0.8, 1.0),
    lengths: Sequence[int] = (2, 6, 12),
    rules: Sequence[str] = RULES,
    max_new_tokens: int = 64,
    limit: int | None = None,
    batch_size: int = 16,
    template: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    out: str = "",
    json: bool = False,
) -> int:
    """Compare the forecast of every cell with the loop; 1 if fewer than 24 of 27 cells agree.

    Args:
        target: folder or Hub name of the target.
        drafts: draft models with its tokenizer.
        data: the questions.
        temperatures: of both.
        lengths: of the drawn chains.
        rules: verification rules.
        max_new_tokens: of each answer.
        limit: the most questions to ask.
        batch_size: rows decoded together; it does not change what is accepted.
        template: how the target is served.
        dtype: of the target's and the drafts' weights.
        device: of the target.
        seed: of the loop's sampling and of the intervals; the forecast's texts are drawn with the next one.
        out: a JSON file, written after each cell; the cells that it holds are not measured again.
        json: print the results as JSON instead of a table.
    """
    for rule in rules:
        if rule not in RULES:
            raise ValueError(f"unknown rule {rule!r}: there are {', '.join(RULES)}")
    loaded = load_target(target, dtype=dtype, device=device)
    form = find_template(template, loaded.tokenizer)
    prompts = {
        record.id: form.prompt_ids([*record.messages, Message("user", record.questions[0])])
        for record in read_questions(data, limit)
    }
    path = Path(out) if out else None
    results = json_format.loads(path.read_text()) if path and path.exists() else {"cells": []}
    results["machine"] = hardware()
    known = {(cell["draft"], cell["temperature"], cell["rule"], cell["length"]) for cell in results["cells"]}
    for heat in temperatures:
        study = Comparison(
            loaded, prompts, resolve_settings(loaded.generation_config, temperature=heat, seed=seed), max_new_tokens,
            batch_size,
        )  # fmt: skip
        wanted = [
            (draft, rule, length)
            for draft in drafts
            for rule in RULES
            for length in lengths
            if rule in rules and (draft, heat, rule, length) not in known
        ]
        texts = study.draw() if wanted else []
        for draft, rule, length in wanted:
            cell = study.cell(draft, rule, length, texts, dtype)
            results["cells"].append({"draft": draft, "temperature": heat} | cell)
            progress(f"T={heat:g} {draft} {rule} {length}: {cell['forecast']:.3f}, loop {cell['loop']:.3f}", last=True)
            if path:
                write_json(path, results)
    cells = results["cells"]
    agree = sum(cell["agrees"] for cell in cells)
    if json:
        print(dumps(results, ensure_ascii=False))
    else:
        show([table(cells)])
    print(f"{agree} of {len(cells)} cells agree")
    return int(agree * 27 < 24 * len(cells))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Forecasts and loops on the same prompts (token ids by id) at one temperature."""

    target: HFTarget
    prompts: dict[str, list[int]]
    settings: Settings
    max_new_tokens: int
    batch_size: int

    def draw(self) -> list[DrawnText]:
        """A text of plain decoding for each prompt, with log-probabilities."""
        done, noting = self._decode(Empty(), RULES[0], self.settings.seed + 1)
        return self._texts(done, noting)

    def cell(
        self, draft: str, rule: RuleName, length: int, texts: Sequence[DrawnText], dtype: str = "auto"
    ) -> dict[str, Any]:
        spec = f"small:{draft}[sample=true,top_k=1,num_draft_tokens={length},costs=none,dtype={dtype}]"
        drafter = next(iter(parse_drafters(spec).values()))
        drafter.bind(self.target)
        done, noting = self._decode(drafter, rule, self.settings.seed)
        tokens = np.array([len(one.token_ids) for one in done])
        steps = np.array([len(one.traces) for one in done])
        said = self._forecast(drafter, texts, rule, length)
        same = self._forecast(drafter, self._texts(done, noting), rule, length)
        seed = self.settings.seed
        error = difference_interval(said.tokens, said.steps, tokens, steps, seed=seed)
        closer = difference_interval(same.tokens, same.steps, tokens, steps, seed=seed)
        nodes = sum(trace.nodes for one in done for trace in one.traces)
        return {
            "rule": rule,
            "length": length,
            "forecast": said.accepted_length,
            "forecast_interval": ratio_interval(said.tokens, said.steps, seed=seed),
            "loop": float(tokens.sum() / steps.sum()),
            "loop_interval": ratio_interval(tokens, steps, seed=seed),
            "difference_interval": error,
            "agrees": error is not None and error[0] <= 0 <= error[1],
            "same_texts": same.accepted_length,
            "same_texts_difference_interval": closer,
            "same_texts_agree": closer is not None and closer[0] <= 0 <= closer[1],
            "nodes_per_step": nodes / float(steps.sum()),
            "same_texts_nodes_per_step": same.nodes_per_step,
            "texts": len(done),
            "steps": int(steps.sum()),
        }

    def _decode(self, drafter: Drafter, rule: RuleName, seed: int) -> tuple[list[Generation], NotingRule]:
        noting, stops = NotingRule(rule), self.target.stops(self.max_new_tokens)
        rows = [
            Row(key, ids, replace(self.settings, seed=seed), stops, self.target.tokenizer)
            for key, ids in self.prompts.items()
        ]
        with Engine(self.target, drafter, batch_size=self.batch_size, rule=noting) as engine:
            return engine.run(rows, strict=True), noting

    def _texts(self, done: Sequence[Generation], noting: NotingRule) -> list[DrawnText]:
        return [
            DrawnText(one.row, ids, one.token_ids, np.array(noting.take(one.row, len(ids), len(one.token_ids))))
            for one, ids in zip(done, self.prompts.values(), strict=True)
        ]

    def _forecast(self, drafter: Any, texts: Sequence[DrawnText], rule: RuleName, length: int) -> DraftFigures:
        run = Forecast(texts, self.settings, [length], [rule], self.max_new_tokens)
        return next(iter(run.figures(check_draws("small", drafter)).values()))[0]


def table(cells: Sequence[dict[str, Any]]) -> Table:
    """A row per cell."""
    rows = table_of(["draft", "T", "rule", "length", "forecast", "loop", "agrees", "same texts"], left=1)
    for cell in cells:
        rows.add_row(
            Path(cell["draft"]).name,
            f"{cell['temperature']:g}",
            cell["rule"],
            str(cell["length"]),
            with_interval(cell["forecast"], cell["forecast_interval"]),
            with_interval(cell["loop"], cell["loop_interval"]),
            "yes" if cell["agrees"] else "NO",
            number(cell["same_texts"]) + ("" if cell["same_texts_agree"] else " NO"),
        )
    return rows


if __name__ == "__main__":
    raise SystemExit(run_study(forecast))
