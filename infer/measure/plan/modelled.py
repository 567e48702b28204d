"""A survey and costs of a machine that is not here: modelled from the target's config, nothing is timed.

The loop around the passes is taken to cost nothing, since a launch is part of each pass and the rest runs beside it;
training is taken to reach TRAINING_SHARE of the machine's arithmetic.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from draftsmith.infer.contract.protocols import Drafter, PassTimer
from draftsmith.infer.costs.identity import TargetIdentity, config_hash, short_name
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.costs.roofline import CPU, TRAINING_SHARE, MachineFigures, load_machine, pass_cost
from draftsmith.infer.costs.timing import PassShape, visit
from draftsmith.infer.measure.plan.loop_timing import Overhead
from draftsmith.infer.measure.plan.memory import check_fits
from draftsmith.infer.measure.plan.shapes import Size, SurveyRequest, shaped_config, size_of
from draftsmith.infer.measure.plan.survey import Survey
from draftsmith.infer.measure.plan.this_machine import this_machine
from draftsmith.infer.measure.plan.work import work_of
from draftsmith.infer.measure.predicted import TARGET

GIB = 2**30
TRIES = 5


def machine_for(name: str, config: Any, dtype: torch.dtype) -> MachineFigures:
    """The machine of this name or file; `cpu` is measured here, in seconds."""
    return this_machine(config, dtype) if name == CPU else load_machine(name)


def modelled_survey(
    config: Any,
    dtype: torch.dtype,
    machine: MachineFigures,
    asked: SurveyRequest,
    *,
    name: str = "",
    tokenizer: str = "",
) -> Survey:
    """What `survey` measures, modelled for `machine`."""
    where = torch.device(machine.device)
    configs = {TARGET: config} | {str(s): shaped_config(config, s) for s in (*asked.shapes, *asked.estimated)}
    sizes = {key: size_of(one, dtype, where) for key, one in configs.items()}
    sizes |= {str(head): head.sized(config, dtype) for head in asked.heads}
    check_fits(config, sizes, asked, machine.memory, machine.name)
    passes = {key: pass_cost(machine, work_of(one, dtype)) for key, one in configs.items()}
    passes |= {str(head): pass_cost(machine, head.work(config, dtype)) for head in asked.heads}
    facts = machine.describe(str(dtype).removeprefix("torch."))
    return Survey(
        asked,
        passes,
        sizes,
        Overhead(0.0, 0.0, 0.0, 0.0),
        TRAINING_SHARE * machine.rate(facts["dtype"]),
        facts,
        target=_identity(config, sizes[TARGET], name, tokenizer),
    )


def modelled_costs(
    config: Any, dtype: torch.dtype, machine: MachineFigures, *, name: str = "", tokenizer: str = ""
) -> Costs:
    """The target's pass costs on `machine`."""
    size = size_of(config, dtype, torch.device(machine.device))
    if size.total_bytes > machine.memory:
        raise ValueError(
            f"{short_name(name)} takes {size.total_bytes / GIB:.1f} GiB in {str(dtype).removeprefix('torch.')}, and "
            f"{machine.name} has {machine.memory / GIB:.1f} GiB"
        )
    facts = machine.describe(str(dtype).removeprefix("torch."))
    passes = {TARGET: pass_cost(machine, work_of(config, dtype))}
    return Costs(passes, machine=facts, target=_identity(config, size, name, tokenizer))


def draft_ratio(drafter: Drafter, dtype: torch.dtype, machine: MachineFigures, context: int = 128) -> float:
    """How long a one-token pass of the drafter's model takes on `machine`, over how long it takes here; 1 without one.

    A replay runs a draft model here, and its seconds are those of this machine.
    """
    model = getattr(drafter, "model", None)
    timers: dict[str, PassTimer] = getattr(drafter, "pass_timers", dict)()
    if model is None or not timers:
        return 1.0
    cost = pass_cost(machine, work_of(model.config, dtype))
    shape = PassShape(1, 1, min(context, *(timer.max_positions - 1 for timer in timers.values())))
    here = 0.0
    for timer in timers.values():
        try:
            here += min(visit(timer, shape, time.perf_counter) for _ in range(TRIES))
        finally:
            timer.close()
    return cost.even(1, 1, shape.context) / here


def _identity(config: Any, size: Size, name: str, tokenizer: str) -> TargetIdentity:
    vocab_size = int(config.get_text_config().vocab_size)
    return TargetIdentity(short_name(name), config_hash(config), size.parameters, vocab_size, tokenizer=tokenizer)
