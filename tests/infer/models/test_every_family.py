"""Every causal LM family of the installed transformers: trees come out as `generate` does, or the model is refused.

A tiny random float64 model of each, three rows of uneven length beyond every window, trees that are right in parts.
"""

from __future__ import annotations

import functools
from collections import Counter

import pytest
from tiny_families import HalfRight, plain_answer, tiny_family
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.models.architectures import refusal
from draftsmith.infer.models.hf_target import HFTarget

LENGTHS, NEW = (25, 34, 43), (24, 20, 16)
FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# Whose tiny model transformers cannot build or run, and the beginning of what it raises.
UNBUILDABLE = {
    "blt": "AttributeError: 'BltConfig' object has no attribute 'num_hidden_layers'",
    "dots3_note": "RuntimeError: The size of tensor",
    "dots3_note_text": "RuntimeError: The size of tensor",
    "gemma3n": "ImportError",  # timm
    "gemma4_assistant": "StrictDataclassClassValidationError",
    "gemma4_unified_assistant": "ValueError: inputs_embeds and shared_kv_states",
    "qwen4_exp": "TypeError: unsupported operand",
    "qwen4_exp_text": "TypeError: unsupported operand",
    "xlstm": "RuntimeError: The expanded size of the tensor",
}


@functools.cache
def outcome(kind: str) -> tuple[str, str]:
    """right, wrong, refused or not built; and why."""
    from transformers import GenerationConfig

    try:
        config = CONFIG_MAPPING[kind]()
        reason = refusal(config)
        if reason:
            return "refused", reason
        model = tiny_family(kind)
    except Exception as problem:  # transformers' own
        return "not built", f"{type(problem).__name__}: {problem}"
    model.generation_config = GenerationConfig(pad_token_id=0)
    try:
        target = HFTarget(model)
    except ValueError as problem:
        return "refused", str(problem)
    prompts = [[8 + (7 * at + 11 * row) % 72 for at in range(length)] for row, length in enumerate(LENGTHS)]
    answers = {str(i): plain_answer(model, ids, new) for i, (ids, new) in enumerate(zip(prompts, NEW))}
    drafter = HalfRight("half right", 0, 4)
    drafter.learn(answers)
    drafter.bind(target)
    rows = [Row(str(i), ids, Settings(), Stops(new)) for i, (ids, new) in enumerate(zip(prompts, NEW))]
    made = generate(target, drafter, rows, batch_size=3)
    for i, generation in enumerate(made):
        if generation.token_ids != answers[str(i)]:
            return "wrong", f"row {i}: {generation.token_ids} instead of {answers[str(i)]}"
    traces = [trace for generation in made for trace in generation.traces]
    assert max(trace.accepted for trace in traces) >= 2
    assert any(not tried.accepted for trace in traces for tried in trace.tried)
    return "right", f"{target.draft_shape}s"


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_a_family_is_right_or_refused_with_the_reason(kind: str) -> None:
    result, why = outcome(kind)
    assert result in ("right", "refused") or (result == "not built" and why.startswith(UNBUILDABLE[kind])), why
    assert result != "refused" or (why and "\n" not in why)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_most_families_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    found = {kind: outcome(kind) for kind in FAMILIES}
    counts = Counter(result for result, _ in found.values())
    with capsys.disabled():
        print(f"\n{dict(counts)} of {len(FAMILIES)} families")
        for kind, (result, why) in found.items():
            if result != "right":
                print(f"  {kind} {result}: {why[:160]}")
    assert not counts["wrong"]
    assert counts["not built"] == len(UNBUILDABLE)
    assert counts["right"] >= 120
