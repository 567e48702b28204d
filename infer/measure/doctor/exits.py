"""Checks of a sorted draft's exits: whether it has these layers, and was trained to end there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from draftsmith.infer.measure.doctor.exam import gain
from draftsmith.infer.measure.doctor.finding import Finding

CHECK = "exits"
# An exit that was trained predicts better than this share of the loss of guessing.
GUESSING = 0.75


def check_exits(
    exits: Sequence[int],
    layers: int,
    reference: Sequence[int] | None,
    losses: Sequence[torch.Tensor],
    vocab_size: int,
) -> Finding:
    """`losses`: [N] by number of layers, from 1 on; empty if they could not be measured."""
    named = ", ".join(map(str, exits))
    if list(exits) != sorted(set(exits)) or exits[0] < 1 or exits[-1] != layers:
        return Finding.wrong(
            CHECK,
            f"{named} must rise and end with its {layers} layers",
            "write the exits that it was trained with as sorted_exits into config.json",
        )
    if reference is not None and list(exits) != [one for one in reference if one <= layers]:
        theirs = ", ".join(map(str, reference))
        return Finding.wrong(
            CHECK, f"{named}, and the reference's are {theirs}", "copy sorted_exits of its config.json"
        )
    if not losses:
        return Finding.unknown(CHECK, f"{named} fit its {layers} layers; how well they predict was not measured")
    means = [float(one.mean()) for one in losses]
    untrained = "write the exits that it was trained with as sorted_exits, or train it with `draftsmith train soft`"
    for exit in exits:
        own, guess = means[exit - 1], GUESSING * math.log(vocab_size)
        if own > guess:
            by_layer = ", ".join(f"{one:.2f}" for one in means)
            return Finding.wrong(
                CHECK, f"exit {exit} hardly predicts ({own:.2f} nats a token; by layer {by_layer})", untrained
            )
        shallower = min(range(exit), key=lambda at: means[at])
        if shallower + 1 < exit and gain(losses[exit - 1], losses[shallower]):
            return Finding.wrong(
                CHECK,
                f"exit {exit} predicts worse than its first {shallower + 1} layers do ({own:.2f} and "
                f"{means[shallower]:.2f} nats a token)",
                untrained,
            )
    each = ", ".join(f"{exit}: {means[exit - 1]:.2f}" for exit in exits)
    return Finding.ok(CHECK, f"nats a token after layers {each}")
