"""Targets and drafters given to an engine by name: folders and Hub names, and drafters as the commands write them."""

from __future__ import annotations

from draftsmith.infer.contract.protocols import Drafter, Target
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.drafters.registry import check_drafter, load_drafter
from draftsmith.infer.models.load import load_target


def target_and_drafter(
    target: str | Target, drafter: str | Drafter | None, dtype: str, device: str
) -> tuple[Target, Drafter]:
    """What is named is loaded, and a named drafter is bound; what is given as an object is taken as it stands.

    What a drafter's name says is checked before the target is loaded, which may take minutes.
    """
    if isinstance(drafter, str):
        check_drafter(drafter)
    if isinstance(target, str):
        loaded: Target = load_target(target, dtype=dtype, device=device)
    elif (dtype, device) != ("auto", "auto"):
        raise ValueError("dtype and device are for a target that is loaded by name: load yours with them")
    else:
        loaded = target
    if drafter is None:
        return loaded, Empty()
    return loaded, load_drafter(drafter, loaded) if isinstance(drafter, str) else drafter
