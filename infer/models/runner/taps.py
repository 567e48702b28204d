"""Hidden states of a model by name, taken where they arise: only the layers that are asked for are kept.

`layer:k` is the state before layer k (k = 0: the embeddings; the number of layers: after the last one, before the final
norm); `last` is the state after the final norm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from draftsmith.infer.models.layers import stack_path, state_of


class Taps:
    """Taps on `model`. A hook is set when its name is first asked for, and keeps nothing in passes that do not ask."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.num_layers = int(model.config.get_text_config().num_hidden_layers)
        self._hooked: set[str] = set()
        self._asked: frozenset[str] = frozenset()
        self._taken: dict[str, torch.Tensor] = {}

    def check(self, name: str) -> None:
        """ValueError if the model has no such state."""
        kind, _, number = name.partition(":")
        if name != "last" and not (kind == "layer" and number.isdecimal() and int(number) <= self.num_layers):
            raise ValueError(
                f"unknown feature {name!r}: use 'last', or 'layer:k' for the state before layer k, up to "
                f"layer:{self.num_layers}"
            )

    @contextlib.contextmanager
    def taking(self, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
        """The states [1, N, D] of the pass that is run inside, by name."""
        for name in names:
            if name not in self._hooked:
                self.check(name)
                self._hook(name)
                self._hooked.add(name)
        self._asked, self._taken = frozenset(names), {}
        try:
            yield self._taken
        finally:
            self._asked, self._taken = frozenset(), {}

    def _hook(self, name: str) -> None:
        def keep(output: Any) -> None:
            if name in self._asked:
                self._taken[name] = state_of(output)

        path = stack_path(self.model)
        layers = self.model.get_submodule(path)
        if name == "last":  # what the module around the layers returns, to which the head is applied
            owner = self.model.get_submodule(path.rpartition(".")[0])
            owner.register_forward_hook(lambda module, given, output: keep(output[0]))
            return
        number = int(name.partition(":")[2])
        if number == self.num_layers:
            layers[-1].register_forward_hook(lambda module, given, output: keep(output))
            return
        layers[number].register_forward_pre_hook(
            lambda module, given, named: keep(given[0] if given else named["hidden_states"]), with_kwargs=True
        )
