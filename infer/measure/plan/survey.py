"""What `plan` measures on this machine: passes of the target and of each shape, the loop around them, and training.

All models have random weights and real sizes. A machine's speed drifts while shapes are timed one after another, so
each shape is timed beside the same pass of the target and its times are scaled by it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from draftsmith.infer.contract.protocols import PassTimer
from draftsmith.infer.costs.identity import TargetIdentity, config_hash, machine, short_name
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.costs.timing import (
    PassShape,
    TimedPass,
    fit,
    grid,
    left_out,
    measure_together,
    visit,
)
from draftsmith.infer.drafters.lm_drafter import LMDrafter
from draftsmith.infer.drafters.small_lm import SmallLM
from draftsmith.infer.measure.plan.loop_timing import Overhead, overhead
from draftsmith.infer.measure.plan.memory import check_room
from draftsmith.infer.measure.plan.schedule import (
    DRAFT_TOKENS,
    LOOP,
    LOOP_CONTEXT,
    TARGET,
    TRAINED_TOKENS,
    TRAINING,
    TRAINING_STEPS,
    Say,
    SurveySchedule,
    loop_lengths,
)
from draftsmith.infer.measure.plan.shapes import (
    Size,
    SurveyRequest,
    check_enough,
    estimate_cost,
    leave_one_out,
    random_model,
    shaped_config,
    size_of,
)
from draftsmith.infer.models.architectures import prepare
from draftsmith.infer.models.decoding_runner import decoding_runner
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.pass_timer import CachedPassTimer
from draftsmith.infer.models.runner.model_runner import ModelRunner


@dataclass(slots=True)
class Survey:
    """The measurements. `passes`: by "target" or shape; `errors`: the fits' relative errors on points left out."""

    asked: SurveyRequest
    passes: dict[str, PassCost]
    sizes: dict[str, Size]
    overhead: Overhead
    training_flops: float
    machine: dict[str, Any]
    errors: dict[str, list[float]] = field(default_factory=dict)

    target: TargetIdentity | None = None

    def costs(self) -> Costs:
        """The content of a costs file, with the overhead of a plain step of one row. Passes of heads have the names
        that drafters give them; of several of a kind the first one counts."""
        kinds, named = {str(head): head.kind for head in self.asked.heads}, dict[str, PassCost]()
        for name, cost in self.passes.items():
            named.setdefault("target" if name == "target" else kinds.get(name, f"small:{name}"), cost)
        return Costs(named, self.overhead(1, 0), self.machine, self.target)


def survey(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    asked: SurveyRequest,
    *,
    seconds: float = 300.0,
    say: Say = lambda line, last=False: None,
    name: str = "",
    tokenizer: str = "",
) -> Survey:
    """Measure all of `asked`; timing the passes takes at most `seconds`, building models and the loop come on top.

    `name` and `tokenizer` (a fingerprint, "" for none) are the target's, recorded with the costs.
    """
    if asked.estimated:
        check_enough(len(asked.shapes))
    sizes = {"target": size_of(config, dtype, device)}
    sizes |= {str(s): size_of(shaped_config(config, s), dtype, device) for s in (*asked.shapes, *asked.estimated)}
    sizes |= {str(head): head.sized(config, dtype) for head in asked.heads}
    check_room(config, sizes, asked, device)
    found = Survey(asked, {}, sizes, Overhead(0, 0, 0, 0), 0.0, {})
    schedule = SurveySchedule(say)
    _measure(found, config, dtype, device, seconds, schedule)  # its models are freed before training needs memory
    _estimate(found)
    schedule.begin(TRAINING)
    found.training_flops = training_flops(shaped_config(config, asked.shapes[0]), sizes[str(asked.shapes[0])], device)
    schedule.end()
    found.machine = machine(device, dtype)
    vocab_size = int(config.get_text_config().vocab_size)
    found.target = TargetIdentity(
        short_name(name), config_hash(config), sizes["target"].parameters, vocab_size, tokenizer=tokenizer
    )
    return found


def _measure(
    found: Survey, config: Any, dtype: torch.dtype, device: torch.device, seconds: float, schedule: SurveySchedule
) -> None:
    """The passes of the target and of the shapes, and the loop around them."""
    asked = found.asked
    schedule.say("building a target with random weights")
    target = HFTarget(random_model(config, dtype, device))
    target_timer = _timer(target)
    tokens = sorted({1, *(nodes + 1 for nodes in asked.nodes)})
    schedule.plan(asked, found.sizes, probe(target_timer, asked, tokens), tokens, seconds)
    reference = PassShape(min(asked.batch_sizes), 1, max(asked.contexts))
    asks = grid(asked.batch_sizes, tokens, asked.contexts)
    allowed = schedule.begin(TARGET)
    points = measure_together({"": (target_timer, asks)}, seconds=allowed, progress=schedule)[""]
    base = next(point.seconds for point in points if point.shape == reference)
    found.passes["target"] = fit(points, target.buckets)
    found.errors["target"] = left_out(points, target.buckets)

    def timed(name: str, timer: PassTimer) -> PassCost:
        jobs = {
            "": (target_timer, [reference]),
            "draft": (timer, grid(asked.batch_sizes, DRAFT_TOKENS, asked.contexts)),
        }
        points = measure_together(jobs, seconds=schedule.begin(name), progress=schedule)
        drift = base / points[""][0].seconds
        return fit([TimedPass(one.shape, one.seconds * drift) for one in points["draft"]], timer.buckets)

    for i, shape in enumerate(asked.shapes):
        draft = random_model(shaped_config(config, shape), dtype, device)
        found.passes[str(shape)] = timed(str(shape), CachedPassTimer(decoding_runner(draft, prepare(draft))))
        if not i:
            schedule.begin(LOOP)
            found.overhead = _overhead(asked, target, draft)
        del draft  # before the next one is built
    for head in asked.heads:
        found.passes[str(head)] = timed(str(head), head.timer(config, dtype, device))


def probe(timer: PassTimer, asked: SurveyRequest, tokens: Sequence[int]) -> PassCost:
    """A rough cost of passes, from the smallest and the largest ones only: enough to say how long the survey takes."""
    ends = [(min(some), max(some)) for some in (asked.batch_sizes, tokens, asked.contexts)]
    first = [TimedPass(shape, visit(timer, shape, time.perf_counter)) for shape in grid(*ends)]
    timer.close()
    return fit(first, timer.buckets)


def _chain(model: Any, length: int) -> LMDrafter:
    return SmallLM(model, num_draft_tokens=length, top_k=1, min_confidence=0.0)


def _timer(target: HFTarget) -> CachedPassTimer:
    if not isinstance(target.lm, ModelRunner):
        kind = target.model.config.model_type
        raise ValueError(f"plan sizes drafts for targets that verify trees, and {kind} verifies chains only")
    return CachedPassTimer(target.lm)


def _overhead(asked: SurveyRequest, target: HFTarget, draft: Any) -> Overhead:
    target_timer, draft_timer = _timer(target), CachedPassTimer(decoding_runner(draft, prepare(draft)))
    # Prompts are read before anything is timed, so they are short.
    context = min(LOOP_CONTEXT, *asked.contexts)

    def around_s(rows: int, length: int) -> float:
        drafting = length * draft_timer.around(rows, 1, context) if length else 0.0
        return drafting + target_timer.around(rows, length + 1, context)

    return overhead(
        target,
        lambda length: _chain(draft, length),
        around_s,
        batch_sizes=sorted({min(asked.batch_sizes), max(asked.batch_sizes)}),
        lengths=loop_lengths(asked),
        context=context,
    )


def _estimate(found: Survey) -> None:
    """Estimate the shapes that were not measured, and the error of such estimates on those that were."""
    measured = [(found.sizes[str(shape)], found.passes[str(shape)]) for shape in found.asked.shapes]
    for shape in found.asked.estimated:
        found.passes[str(shape)] = estimate_cost(measured, found.sizes[str(shape)])
    context = max(found.asked.contexts)
    found.errors["shapes"] = [
        error for rows in found.asked.batch_sizes for error in leave_one_out(measured, rows, context)
    ]


def training_flops(config: Any, size: Size, device: torch.device) -> float:
    """FLOP/s of training a draft: 6 per multiplied weight and token, over the time of a forward and backward pass.

    In bfloat16 with float32 weights, as training runs; the median of three steps after a warm-up step.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).train()
    tokens_BT = torch.zeros((1, TRAINED_TOKENS), dtype=torch.long, device=device)
    taken = []
    for _ in range(TRAINING_STEPS):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return 6 * size.multiplied * TRAINED_TOKENS / median(taken[1:])
