"""Predicted speedup: an accepted_length (assumed or replayed) and the measured costs of passes, no decoding.

A plain step commits one token; a step with drafts commits accepted_length of them. So

    speedup = accepted_length * t_target(1) / (t_draft + t_target(nodes + 1) + overhead)

and break-even, the accepted_length at which speedup is 1, is the ratio of the two steps' seconds. Passes are packed, so
a step of a batch costs what the total of its trees' nodes costs, averaged over the totals that independent rows have.
Plain decoding is charged no overhead, which makes the figures conservative.

Legend: N numbers of nodes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from draftsmith.infer.contract.trace import StepTrace
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.measure.metrics import Totals
from draftsmith.infer.text.tokenizer import tokenizer_fingerprint

BATCH_SIZES = (1, 4, 8, 16, 32)
TARGET = "target"
# Proposing is mentioned where it takes this many seconds or, with costs, this share of a plain pass.
SHOWN_S, SHOWN_RATIO = 1e-4, 0.01

# Acceptance by depth; the last value holds for all greater depths. For a chain, the share of the tokens reached at a
# depth that were accepted; for a tree, the share of the steps that reached a depth and got to the next, since several
# candidates may be tried for one that is accepted. The two are not interchangeable.
AcceptanceByDepth = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of a plain step and of a step with drafts, both of `batch_size` rows."""

    batch_size: int
    accepted_length: float
    plain_s: float
    step_s: float

    @property
    def break_even(self) -> float:
        """The accepted_length at which speedup is 1."""
        return self.step_s / self.plain_s

    @property
    def speedup(self) -> float:
        return self.accepted_length / self.break_even

    @property
    def pays(self) -> bool:
        return self.speedup > 1

    def to_json(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "speedup": self.speedup,
            "break_even": self.break_even,
            "pays": self.pays,
            "plain_step_s": self.plain_s,
            "step_s": self.step_s,
        }


def check_tokenizer(costs: Costs, tokenizer: Any, path: str) -> None:
    """Refuse the costs of a target that did not write the logs: its tokenizer or its vocabulary is another one."""
    assert costs.target is not None, "a costs file names its target"
    if not costs.target.fits_tokenizer(tokenizer_fingerprint(tokenizer), len(tokenizer)):
        raise ValueError(
            f"{path} holds the costs of {costs.target.name} ({costs.target.vocab_size} token ids), and the logs' "
            f"tokenizer is another one ({len(tokenizer)} token ids): run `draftsmith plan` for the target of the logs"
        )


def predict(
    costs: Costs,
    batch_size: int,
    *,
    accepted_length: float,
    nodes: int | Sequence[int],
    draft_s: float,
    context: float = 0.0,
) -> Prediction:
    """One batch size.

    Args:
        costs: of this machine, including the target's passes.
        batch_size: rows per step.
        accepted_length: committed tokens per row and step.
        nodes: of every draft, or a list of equally likely sizes.
        draft_s: seconds to draft for all rows of a step.
        context: committed tokens of a row.
    """
    if batch_size < 1:
        raise ValueError(f"a batch size is at least 1, not {batch_size}")
    target = costs.of(TARGET)
    shares_N = total_shares([nodes] if isinstance(nodes, int) else nodes, batch_size)
    verify_s = sum(
        float(shares_N[total]) * target(count, batch_size * context, count * context, batch_size)
        for total in map(int, np.flatnonzero(shares_N))
        for count in [batch_size + total]
    )
    return Prediction(
        batch_size, accepted_length, target.even(batch_size, 1, context), draft_s + verify_s + costs.overhead
    )


def total_shares(sizes: Sequence[int], draws: int) -> np.ndarray:
    """[N] the probability of each sum of `draws` independent draws from `sizes`."""
    if not sizes:
        raise ValueError("there is no step to predict anything from")
    one_N = np.bincount(sizes) / len(sizes)
    total_N = np.ones(1)
    for _ in range(draws):
        total_N = np.convolve(total_N, one_N)
    return total_N


def largest_that_pays(at: Callable[[int], Prediction], upto: int) -> int:
    """The largest batch size up to which drafting pays at 1, 2, ... rows; 0 if it pays at none."""
    for batch_size in range(1, upto + 1):
        if not at(batch_size).pays:
            return batch_size - 1
    return upto


def measured_rows(costs: Costs, nodes: int) -> int:
    """The largest batch whose passes over `nodes` + 1 tokens a row lie in the measured range; 0 if none does."""
    return int(max(costs.of(TARGET).tokens)) // (nodes + 1)


def predict_replayed(
    traces: Sequence[StepTrace], costs: Costs, batch_sizes: Sequence[int], draft_ratio: float = 1.0
) -> dict[str, Any]:
    """Predictions for a replayed drafter at `batch_sizes`, and the batch size above which to turn it off.

    accepted_length, draft sizes and propose times come from the replay, passes from `costs`. The replay proposed for
    one row at a time: time in the draft model's passes is scaled like the target's one-token pass, the rest by the
    number of rows. `off_above` is None if the drafter pays up to the largest batch size; `measured_up_to` is the
    largest batch whose passes over the mean draft lie in the measured range. `draft_ratio`: how long the draft model's
    passes take on the machine of `costs`, over how long they took here. `pass_ratio` and `propose_ratio`: what a row's
    pass over its drafts costs, and all else of its step, in plain passes.
    """
    totals = Totals.of(traces)
    context = sum(trace.context for trace in traces) / len(traces)
    propose_s = sum(trace.propose_s for trace in traces) / len(traces)
    model_s = totals.draft_s / len(traces)
    own_s, model_s = propose_s - model_s, model_s * draft_ratio
    target, nodes = costs.of(TARGET), [trace.nodes for trace in traces]
    accepted_length = totals.committed / totals.steps

    def at(batch_size: int) -> Prediction:
        scale = target.even(batch_size, 1, context) / target.even(1, 1, context)
        draft_s = batch_size * own_s + scale * model_s
        return predict(
            costs, batch_size, accepted_length=accepted_length, nodes=nodes, draft_s=draft_s, context=context
        )

    alone = at(1)
    propose_ratio = (own_s + model_s + costs.overhead) / alone.plain_s
    most = max(batch_sizes)
    pays_up_to = largest_that_pays(at, most)
    return {
        "by_batch_size": [at(batch_size).to_json() for batch_size in batch_sizes],
        "off_above": None if pays_up_to == most else pays_up_to,
        "measured_up_to": measured_rows(costs, round(totals.nodes / totals.steps)),
        "context": context,
        "propose_s": own_s + model_s,
        "pass_ratio": alone.break_even - propose_ratio,
        "propose_ratio": propose_ratio,
        "speedup": alone.speedup,
    }


def pays_if(figures: Mapping[str, Any], predicted: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a row's pass over its drafts may cost, in plain passes, for a drafter to pay; and what it does cost, if
    costs are known. Without them, proposing is not yet taken off `limit`."""
    proposing = predicted["propose_ratio"] if predicted else 0.0
    return {
        "nodes": round(figures["nodes_per_step"]),
        "limit": figures["accepted_length"] - proposing,
        "pass_ratio": predicted["pass_ratio"] if predicted else None,
        "propose_ratio": predicted["propose_ratio"] if predicted else None,
        "propose_s": (predicted or figures).get("propose_s", figures["propose_p50_s"]),
        "speedup": predicted["speedup"] if predicted else None,
    }


def conclusion(drafters: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, str]:
    """The drafter that would be fastest for one row (without costs: with the largest accepted_length), and when it
    pays, in a sentence. `where`: what the costs are of, as in `modelled on an H100`."""
    name = max(drafters, key=lambda one: drafters[one]["pays_if"]["speedup"] or drafters[one]["accepted_length"])
    found = drafters[name]["pays_if"]
    if drafters[name]["accepted_length"] <= 1:
        return {"drafter": name, "sentence": f"no draft was accepted here: {name} cannot pay."}
    nodes = "1 node" if found["nodes"] == 1 else f"{found['nodes']} nodes"
    if found["pass_ratio"] is None:
        proposing = (
            f", with {found['propose_s'] * 1e3:.2g} ms to propose them," if found["propose_s"] >= SHOWN_S else ""
        )
        say = f"{name} pays here if a pass over {nodes}{proposing} costs less than {found['limit']:.2f} plain ones."
        return {"drafter": name, "sentence": say}
    if found["limit"] <= 0:
        say = f"{name} cannot pay here: proposing alone takes {found['propose_ratio']:.2f} plain passes"
        return {
            "drafter": name,
            "sentence": f"{say} ({where}), for an accepted_length of {found['limit'] + found['propose_ratio']:.2f}.",
        }
    proposing = f", beside {found['propose_ratio']:.2f} for proposing" if found["propose_ratio"] >= SHOWN_RATIO else ""
    faster = f"so {found['speedup']:.2f}x" + ("" if found["speedup"] > 1 else ": plain decoding is faster")
    say = f"{name} pays here if a pass over {nodes} costs less than {found['limit']:.2f} plain ones{proposing}"
    return {"drafter": name, "sentence": f"{say}; {where}: {found['pass_ratio']:.2f}, {faster}."}


def expected_length(acceptance: Sequence[float], depth: int) -> float:
    """accepted_length of drafts `depth` deep: the target's own token, and each depth times how often it is accepted."""
    length, reach = 1.0, 1.0
    for d in range(depth):
        reach *= acceptance[min(d, len(acceptance) - 1)]
        length += reach
    return length


def parse_acceptance(text: str, *, trees: bool = False) -> AcceptanceByDepth:
    """'0.7', '0.8,0.7,0.6' (by depth), FILE, or FILE:DRAFTER, the file a result of bench or replay."""
    try:
        shares = tuple(float(word) for word in text.split(","))
    except ValueError:
        return _from_file(text, trees)
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"acceptance is a share, from 0 to 1, not {text}")
    return shares


def _from_file(text: str, trees: bool) -> AcceptanceByDepth:
    path, name = Path(text), ""
    if not path.is_file():
        before, _, name = text.rpartition(":")
        path = Path(before)
        if not before or not path.is_file():
            raise ValueError(f"{text} is neither a share, shares by depth, nor a file of results")
    row = _drafter(path, name)
    depths = sorted(row["by_depth"], key=lambda one: one["depth"])
    reached = [one["reached"] for one in depths]
    accepted = [one["accepted"] for one in depths]
    survived = [row["steps"], *accepted[:-1]]
    if row.get("verified_jointly"):
        raise ValueError(f"the drafts in {path} were drawn and verified as a whole: measure them with --rule token")
    if not trees and any(tried > came for tried, came in zip(reached, survived)):
        raise ValueError(f"the drafts in {path} were trees: give them as --tree_acceptance")
    shares = tuple(a / b for a, b in zip(accepted, survived if trees else reached) if b)
    if not shares:
        raise ValueError(f"{path}: no draft was ever tried")
    return shares


def _drafter(path: Path, name: str) -> dict[str, Any]:
    """The results of the drafter `name`, or of the only one in the file that drafted anything."""
    try:
        lines = path.read_text(encoding="utf-8").strip()
        results = json.loads(lines if lines.startswith("{") and "\n{" not in lines else lines.splitlines()[-1])
        found = {key: row for key, row in results["drafters"].items() if row.get("by_depth")}
    except (json.JSONDecodeError, IndexError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} holds no results of bench or replay: give a file with their --json line") from None
    if name and name not in found:
        raise ValueError(f"{path} has no figures by depth of {name!r}; it has them of {', '.join(found) or 'none'}")
    if not name and len(found) != 1:
        names = ", ".join(found) or "none"
        raise ValueError(f"{path} has figures by depth of {names}: name one drafter, as {path}:NAME")
    return dict(found[name] if name else next(iter(found.values())))
