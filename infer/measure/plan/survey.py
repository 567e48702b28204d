"""What `plan` measures on this machine: passes of the target and of each shape, the loop around them, and training.

All models have random weights and real sizes. A machine's speed drifts while shapes are timed one after another, so
each shape is timed beside the same pass of the target and its times are scaled by it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from draftsmith.infer.costs.identity import TargetIdentity, config_hash, machine, short_name
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.costs.timing import (
    PassShape,
    TimedPass,
    fit,
    grid,
    left_out,
    measure_together,
)
from draftsmith.infer.drafters.lm_drafter import LMDrafter
from draftsmith.infer.drafters.small_lm import SmallLM
from draftsmith.infer.measure.plan.loop_timing import Overhead, overhead
from draftsmith.infer.measure.plan.shapes import (
    CandidateShape,
    Size,
    check_enough,
    estimate_cost,
    leave_one_out,
    random_model,
    shaped_config,
    size_of,
)
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.pass_timer import CachedPassTimer

# Tokens per row of a draft pass: 1 in chains, 2 (SmallLM's width) in trees, 4 to fit the slope.
DRAFT_TOKENS = (1, 2, 4)
TRAINED_TOKENS = 256

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class SurveyRequest:
    """The grid to measure; costs of the shapes in `estimated` are fitted to those of `shapes`."""

    batch_sizes: Sequence[int]
    contexts: Sequence[int]
    nodes: Sequence[int]
    shapes: Sequence[CandidateShape]
    estimated: Sequence[CandidateShape] = ()


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
        """The content of a costs file, with the overhead of a plain step of one row."""
        named = {"target" if name == "target" else f"small:{name}": cost for name, cost in self.passes.items()}
        return Costs(named, self.overhead(1, 0), self.machine, self.target)


def survey(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    asked: SurveyRequest,
    *,
    seconds: float = 300.0,
    progress: Progress = lambda line: None,
    name: str = "",
    tokenizer: str = "",
) -> Survey:
    """Measure all of `asked`; timing the passes takes about `seconds`.

    `name` and `tokenizer` (a fingerprint, "" for none) are the target's, recorded with the costs.
    """
    if asked.estimated:
        check_enough(len(asked.shapes))
    sizes = {"target": size_of(config, dtype)}
    sizes |= {str(s): size_of(shaped_config(config, s), dtype) for s in (*asked.shapes, *asked.estimated)}
    check_room(config, sizes, asked, device)
    progress("the target's passes")
    target = HFTarget(random_model(config, dtype, device))
    target_timer = CachedPassTimer(target.lm)
    reference = PassShape(min(asked.batch_sizes), 1, max(asked.contexts))
    asks = grid(asked.batch_sizes, sorted({1, *(nodes + 1 for nodes in asked.nodes)}), asked.contexts)
    points = measure_together({"": (target_timer, asks)}, seconds=seconds * 0.6)[""]
    base = next(point.seconds for point in points if point.shape == reference)
    found = Survey(asked, {"target": fit(points, target.buckets)}, sizes, Overhead(0, 0, 0, 0), 0.0, {})
    found.errors["target"] = left_out(points, target.buckets)
    for i, shape in enumerate(asked.shapes):
        progress(f"the passes of {shape} ({i + 1} of {len(asked.shapes)})")
        draft = random_model(shaped_config(config, shape), dtype, device)
        timer = CachedPassTimer(_chain(draft, 1).lm)
        jobs = {
            "": (target_timer, [reference]),
            "draft": (timer, grid(asked.batch_sizes, DRAFT_TOKENS, asked.contexts)),
        }
        timed = measure_together(jobs, seconds=seconds * 0.4 / len(asked.shapes))
        drift = base / timed[""][0].seconds
        scaled = [TimedPass(point.shape, point.seconds * drift) for point in timed["draft"]]
        found.passes[str(shape)] = fit(scaled, timer.buckets)
        if not i:
            progress("the loop around the passes")
            found.overhead = _overhead(asked, target, draft)
    _estimate(found)
    progress("training")
    found.training_flops = training_flops(shaped_config(config, asked.shapes[0]), sizes[str(asked.shapes[0])], device)
    found.machine = machine(device, dtype)
    vocab_size = int(config.get_text_config().vocab_size)
    found.target = TargetIdentity(
        short_name(name), config_hash(config), sizes["target"].parameters, vocab_size, tokenizer=tokenizer
    )
    return found


def _chain(model: Any, length: int) -> LMDrafter:
    return SmallLM(model, num_draft_tokens=length, top_k=1, min_confidence=0.0)


def _overhead(asked: SurveyRequest, target: HFTarget, draft: Any) -> Overhead:
    target_timer, draft_timer = CachedPassTimer(target.lm), CachedPassTimer(_chain(draft, 1).lm)
    context = min(asked.contexts)

    def around_s(rows: int, length: int) -> float:
        drafting = length * draft_timer.around(rows, 1, context) if length else 0.0
        return drafting + target_timer.around(rows, length + 1, context)

    return overhead(
        target,
        lambda length: _chain(draft, length),
        around_s,
        batch_sizes=sorted({min(asked.batch_sizes), max(asked.batch_sizes)}),
        lengths=sorted({2, max(2, min(8, max(asked.nodes)))}),
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


def check_room(config: Any, sizes: dict[str, Size], asked: SurveyRequest, device: torch.device) -> None:
    """Raise if the positions exceed the model's or weights and caches exceed the memory."""
    from draftsmith.infer.models.architectures import max_positions

    longest = max(asked.contexts) + max(asked.nodes) + 1
    if longest > max_positions(config.get_text_config()):
        raise ValueError(
            f"a context of {max(asked.contexts)} and {max(asked.nodes)} nodes exceed the target's "
            f"{max_positions(config.get_text_config())} positions: use smaller --contexts or --lengths"
        )
    rows = max(asked.batch_sizes)
    drafts = [size for name, size in sizes.items() if name != "target"]
    # On a CPU, packed copies of bfloat16 weights double the size.
    weights = (sizes["target"].total_bytes + max(size.total_bytes for size in drafts)) * (
        2 if device.type == "cpu" else 1
    )
    tokens = rows * (longest + 320) * (sizes["target"].token_bytes + max(size.token_bytes for size in drafts))
    room = _room(device)
    if weights + tokens > room:
        raise ValueError(
            f"this needs {weights / 2**30:.1f} GiB for weights and {tokens / 2**30:.1f} GiB for the cache of {rows} "
            f"rows, and {device.type} has {room / 2**30:.1f} GiB: use smaller --batch_sizes or --contexts"
        )


def _room(device: torch.device) -> int:
    """Available bytes, including reclaimable file caches; all memory where the system reports only that."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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
    for _ in range(4):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return 6 * size.multiplied * TRAINED_TOKENS / median(taken[1:])
