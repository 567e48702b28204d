"""The logits processors that `generate` has prepared, applied to one row of its batch at a time.

A verification rule visits the nodes of one row's draft, in any order and as often as it likes, so a processor must be a
function of the ids and the logits of that row. Processors that are not are refused: those with a state, those that run
the model, and those that hold tensors of the whole batch.

Legend: T positions, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

# Those of transformers that are functions of one row. The repetition penalty holds the padding of every row, and
# allowed prefixes ask for the row's number: both are made anew for each row.
OF_ONE_ROW = frozenset({
    "EpsilonLogitsWarper", "EtaLogitsWarper", "ExponentialDecayLengthPenalty", "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor", "LogitNormalization", "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor", "MinPLogitsWarper", "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor", "PrefixConstrainedLogitsProcessor", "RepetitionPenaltyLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor", "SuppressTokensLogitsProcessor", "TemperatureLogitsWarper",
    "TopHLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TypicalLogitsWarper",
})  # fmt: skip


def check_processors(processors: Sequence[Any]) -> None:
    """ValueError for the first of transformers' processors that one row cannot use alone."""
    for processor in processors:
        name = type(processor).__name__
        if not _is_users(processor) and name not in OF_ONE_ROW:
            raise ValueError(f"speculative() does not support {name}: it is not a function of one row's ids and logits")


class RowProcessors:
    """All processors of row `index`, one after the other. `padding`: the ids to the left of its prompt."""

    def __init__(self, processors: Sequence[Any], index: int, padding: list[int], device: torch.device) -> None:
        self._processors = [_for_row(one, index) for one in processors]
        self._padding = padding
        self._device = device
        self._unchecked = {id(one) for one in self._processors if _is_users(one)}

    def __call__(self, prefix_1T: torch.Tensor, scores_1V: torch.Tensor) -> torch.Tensor:
        """Processed scores in float32, on the device of the processors, as in `generate`."""
        padding_1T = prefix_1T.new_tensor([self._padding])
        ids_1T = torch.cat([padding_1T, prefix_1T], 1).to(self._device)
        made_1V = scores_1V.to(self._device, torch.float32, copy=True)
        for processor in self._processors:
            if id(processor) in self._unchecked:
                self._unchecked.discard(id(processor))
                _check_is_a_function(processor, ids_1T, made_1V)
            made_1V = processor(ids_1T, made_1V)
        return made_1V.to(scores_1V.device)


def _is_users(processor: Any) -> bool:
    return not type(processor).__module__.startswith("transformers.")


def _for_row(processor: Any, index: int) -> Any:
    """`processor`, or what it does for row `index` where it tells rows apart."""
    name = "" if _is_users(processor) else type(processor).__name__
    if name == "RepetitionPenaltyLogitsProcessor" and isinstance(processor.prompt_ignore_length, torch.Tensor):
        made = copy.copy(processor)
        made.prompt_ignore_length = processor.prompt_ignore_length[index : index + 1]
        return made
    if name == "PrefixConstrainedLogitsProcessor":
        allowed = processor._prefix_allowed_tokens_fn
        return type(processor)(lambda _, ids_T: allowed(index, ids_T), 1)
    return processor


def _check_is_a_function(processor: Any, ids_1T: torch.Tensor, scores_1V: torch.Tensor) -> None:
    """A processor of the user's must give [1, V] for one row, and the same when it is called again."""
    first, again = (processor(ids_1T.clone(), scores_1V.clone()) for _ in range(2))
    name = type(processor).__name__
    if first.shape != scores_1V.shape:
        raise ValueError(
            f"the logits processor {name} gives {list(first.shape)} for one row, not {list(scores_1V.shape)}"
        )
    if not torch.equal(first.nan_to_num(), again.nan_to_num()):
        raise ValueError(f"the logits processor {name} changes from call to call, which speculative() does not support")
