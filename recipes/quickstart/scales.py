"""How large the quickstart's models are, how long they are trained and how much is asked, at three scales.

Depth makes a model slow to decode and parameters make it slow to train, so the target is deep and narrow: a draft of
one of its layers then takes a tenth of its time, as it does for models a thousand times larger. It reads a small text
five times: of a like target that read 1.8 MB once, 11 of 20 answers looped, and of this one 7 of 20 (other questions).
It stays in float32: in bfloat16 trees are cheaper to verify, and most answers of a model so unsure end in ties.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class QuickstartScale:
    """How large the models are, how long they are trained, how much is asked. `seconds` is what steps took on one core
    of an AMD EPYC 9004 (2026-11-21; of `full` only the parts were timed); it is fitted to the machine at hand."""

    says: str
    megabytes: float
    vocab_size: int
    hidden_size: int
    layers: int
    exits: str
    target_steps: int
    draft_steps: int
    answers: int
    held_out: int
    questions: int
    new_tokens: int
    documents: int
    cost_seconds: int
    min_distinct: float
    seconds: dict[str, float] = field(default_factory=dict)


SCALES = {
    "smoke": QuickstartScale(
        says="about a minute; every step, and nothing worth believing", megabytes=0.3, vocab_size=512, hidden_size=64,
        layers=3, exits="[1,2]", target_steps=30, draft_steps=6, answers=16, held_out=10, questions=2, new_tokens=20,
        documents=6, cost_seconds=0, min_distinct=0.0,
        seconds={"text": 2, "target": 9, "draft-sft": 1, "draft-soft": 2, "draft-distil": 2, "store-dresd-ood": 1,
                 "calibration": 6, "bench-greedy": 4, "bench-drawn": 4, "report": 1},
    ),
    "small": QuickstartScale(
        says="about ten minutes on two cores", megabytes=0.8, vocab_size=1024, hidden_size=128,
        layers=12, exits="[1,2]", target_steps=250, draft_steps=120, answers=256, held_out=32, questions=20,
        new_tokens=64, documents=48, cost_seconds=20, min_distinct=0.5,
        seconds={"text": 2, "target": 277, "answers.jsonl": 20, "draft-sft": 17, "draft-soft": 30, "draft-distil": 61,
                 "store-dresd-ood": 10, "store-dresd-id": 6, "calibration": 27, "bench-greedy": 159,
                 "bench-drawn": 81, "report": 1},
    ),
    "full": QuickstartScale(
        says="about an hour on two cores", megabytes=5.0, vocab_size=2048, hidden_size=256,
        layers=16, exits="[1,2,4]", target_steps=700, draft_steps=300, answers=800, held_out=80, questions=40,
        new_tokens=96, documents=400, cost_seconds=60, min_distinct=0.5,
        seconds={"text": 5, "target": 2940, "answers.jsonl": 160, "draft-sft": 110, "draft-soft": 300,
                 "draft-distil": 600, "store-dresd-ood": 120, "store-dresd-id": 60, "calibration": 130,
                 "bench-greedy": 770, "bench-drawn": 400, "report": 5},
    ),
}  # fmt: skip
