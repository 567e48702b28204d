"""The target and the drafters that belong to a loaded model, kept between calls of its `generate`.

They hang on the model itself, so that they live as long as it does: a target refers to its model, and a table of
targets, even one with weak keys, would keep every model alive.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from draftsmith.infer.contract.protocols import Drafter
from draftsmith.infer.drafters.registry import load_drafter
from draftsmith.infer.models.hf_target import HFTarget

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ATTRIBUTE = "_draftsmith_kept"


class KeptTarget:
    """The target of one model and the drafters bound to it. Copies and pickles of the model start without any."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._made_for: Any = None
        self._target: HFTarget | None = None
        # A drafter that was given as an object by its id, which stays its own as long as it is held here.
        self._drafters: dict[str | int, Drafter] = {}

    def bound(
        self, model: Any, drafter: str | Drafter, tokenizer: PreTrainedTokenizerBase | None
    ) -> tuple[HFTarget, Drafter]:
        """The target of `model`, made anew if it was moved or its layers were exchanged, and the bound drafter."""
        if self._target is None or self._made_for != _identity(model):
            self._drafters.clear()
            self._target = HFTarget(model)
            self._made_for = _identity(model)
        if tokenizer is not None and self._target.tokenizer is not tokenizer:
            self._drafters.clear()  # they were checked against another tokenizer, or none
            self._target.tokenizer = tokenizer
        key = drafter if isinstance(drafter, str) else id(drafter)
        if key not in self._drafters:
            if isinstance(drafter, str):
                self._drafters[key] = load_drafter(drafter, self._target)
            else:
                drafter.bind(self._target)
                self._drafters[key] = drafter
        return self._target, self._drafters[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptTarget:
        return KeptTarget()

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return KeptTarget, ()


def kept_target(model: Any) -> KeptTarget:
    """What is kept for `model`."""
    kept = vars(model).setdefault(_ATTRIBUTE, KeptTarget())
    assert isinstance(kept, KeptTarget)
    return kept


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """`model` in eval mode, and afterwards as it was; ValueError where this would switch off dropout."""
    training = [module for module in model.modules() if module.training]
    if training:
        rates = {name: rate for name, rate in vars(model.config).items() if "drop" in name and isinstance(rate, float)}
        if any(rates.values()):
            raise ValueError("the model is in training mode, with dropout: call model.eval() first")
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _identity(model: Any) -> tuple[Any, ...]:
    """What a target depends on besides the values of the weights."""
    first = next(model.parameters())
    attention = getattr(model.config, "_attn_implementation", None)
    return first.device, first.dtype, attention, tuple(id(module) for module in model.modules())
