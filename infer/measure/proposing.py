"""What proposing costs a step, and how true a drafter's confidence is: from what a benchmark measured.

By tenths of confidence, what the drafter said (the mean) and what came (the share accepted); calibrating it is another
matter (`draftsmith calibrate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from draftsmith.infer.contract.trace import StepTrace


def propose_figures(traces: Sequence[StepTrace]) -> dict[str, Any]:
    """Median and 99th percentile of a step's proposing in milliseconds, and the reliability of confidences."""
    took = [1e3 * trace.propose_s for trace in traces] or [0.0]
    tried = [tried for trace in traces for tried in trace.tried]
    said, came = np.array([one.confidence for one in tried]), np.array([one.accepted for one in tried])
    tenth = np.minimum((said * 10).astype(int), 9)
    reliability = [
        {"said": float(said[tenth == i].mean()), "came": float(came[tenth == i].mean()), "tried": int(sum(tenth == i))}
        for i in range(10)
        if (tenth == i).any()
    ]
    return {
        "propose_ms_p50": float(np.quantile(took, 0.5)),
        "propose_ms_p99": float(np.quantile(took, 0.99)),
        "reliability": reliability,
    }
