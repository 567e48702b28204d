"""How large the quickstart's models are, how long they are trained and how much is asked, at three scales.

Depth makes a model slow to decode and parameters make it slow to train, so the target is deep and narrow: a draft of
one of its layers then takes a tenth of its time, as it does for models a thousand times larger. What is done with these
numbers is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Scale:
    """How large the models are, how long they are trained, how much is asked. `seconds` is what steps took on two cores
    of an AMD EPYC 9004; it is fitted to the machine at hand."""

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
    "smoke": Scale(
        says="about a minute; every step, and nothing worth believing", megabytes=0.3, vocab_size=512, hidden_size=64,
        layers=3, exits="[1,2]", target_steps=30, draft_steps=6, answers=16, held_out=10, questions=2, new_tokens=20,
        documents=6, cost_seconds=0, min_distinct=0.0,
    ),
    "small": Scale(
        says="about ten minutes on two cores", megabytes=2.4, vocab_size=1024, hidden_size=128,
        layers=14, exits="[1,2]", target_steps=300, draft_steps=120, answers=320, held_out=32, questions=20,
        new_tokens=64, documents=48, cost_seconds=20, min_distinct=0.5,
    ),
    "full": Scale(
        says="about an hour on two cores", megabytes=5.0, vocab_size=2048, hidden_size=256,
        layers=16, exits="[1,2,4]", target_steps=1000, draft_steps=500, answers=1200, held_out=80, questions=60,
        new_tokens=96, documents=400, cost_seconds=60, min_distinct=0.5,
    ),
}  # fmt: skip
