"""What a replayed drafter would be worth where it will run: its traces and the costs of passes, to speedups.

Accepted_length and the sizes of the drafts are the replay's, and so are the seconds to propose; passes are priced by a
costs file. Proposing was measured row by row: what was spent outside a draft model's passes is taken to grow with the
rows, those passes as the target's one-token pass does. The formula is predicted.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from draftsmith.infer.contract.trace import StepTrace
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.measure.metrics import Totals
from draftsmith.infer.measure.predicted import TARGET, Prediction, largest_that_pays, measured_rows, predict


def worth(traces: Sequence[StepTrace], costs: Costs, batch_sizes: Sequence[int]) -> dict[str, Any]:
    """Predictions for `batch_sizes`, and the batch size above which the drafter is to be off.

    `off_above` is None where it pays up to the largest of them; `measured_up_to` is the largest batch whose passes
    over the mean draft lie within what was measured.
    """
    totals = Totals.of(traces)
    context = sum(trace.context for trace in traces) / len(traces)
    propose_s = sum(trace.propose_s for trace in traces) / len(traces)
    model_s = totals.draft_s / len(traces)
    target, nodes = costs.of(TARGET), [trace.nodes for trace in traces]
    accepted_length = totals.committed / totals.steps

    def at(batch_size: int) -> Prediction:
        grown = target(batch_size, 1, context) / target(1, 1, context)
        draft_s = batch_size * (propose_s - model_s) + grown * model_s
        return predict(
            costs, batch_size, accepted_length=accepted_length, nodes=nodes, draft_s=draft_s, context=context
        )

    most = max(batch_sizes)
    pays_up_to = largest_that_pays(at, most)
    return {
        "by_batch_size": [at(batch_size).to_json() for batch_size in batch_sizes],
        "off_above": None if pays_up_to == most else pays_up_to,
        "measured_up_to": measured_rows(costs, round(totals.nodes / totals.steps)),
        "context": context,
        "propose_s": propose_s,
    }
