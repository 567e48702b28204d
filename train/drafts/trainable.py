"""What the trainer knows of a draft, whatever kind it is: a small language model (lm.py), or heads on the target's
states. Objectives know more: they call the draft's own forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:  # `--help` reads the builders, and should not wait for torch
    import torch
    from torch import nn

    from draftsmith.infer.contract.protocols import Drafter
    from draftsmith.infer.heads.folders import TrainedFor
    from draftsmith.train.data.corpus import Corpus

Weights: TypeAlias = "dict[str, torch.Tensor]"


@dataclass(frozen=True, slots=True)
class Curves:
    """By what a run reports its losses: `word` is exit, head or unroll, `numbers` are theirs.

    accepted_length is reported for each exit, but once for heads and unrolls, which draft together.
    """

    word: str
    numbers: tuple[int, ...]

    @property
    def losses(self) -> list[str]:
        """The columns of the losses."""
        return [f"loss_{self.word}_{number}" for number in self.numbers]

    @property
    def lengths(self) -> list[str]:
        """The columns of accepted_length."""
        return [f"accepted_length_exit_{exit}" for exit in self.numbers] if self.word == "exit" else ["accepted_length"]

    def line(self, losses: Sequence[float]) -> str:
        return " ".join(f"[{number}] {loss:.3f}" for number, loss in zip(self.numbers, losses))

    def lengths_line(self, found: Mapping[str, float]) -> str:
        """The accepted_lengths that were found, by column."""
        labels = [f"[{exit}] " for exit in self.numbers] if self.word == "exit" else [""]
        return " ".join(f"{label}{found[name]:.2f}" for label, name in zip(labels, self.lengths) if name in found)


def exit_curves(exits: Sequence[int]) -> Curves:
    return Curves("exit", tuple(exits))


@dataclass(frozen=True, slots=True)
class DraftSizes:
    """What the memory estimate needs to know of a draft.

    Args:
        layers: layers with attention; gradient checkpointing keeps the activations of one at a time.
        width: of the states.
        widest: of a layer's activations.
        vocab_size: rows of an output head.
        heads: output heads that are trained.
        feature_bytes: of the target's states that are kept for each token of a packed row.
    """

    layers: int
    width: int
    widest: int
    vocab_size: int
    heads: int = 1
    feature_bytes: int = 0


class Trainable(Protocol):
    """A draft in training: an nn.Module. `model`: what is saved and drafts, without what only training needs."""

    model: Any
    training: bool

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...
    def __call__(self, *args: Any) -> Any:
        """The forward pass of a batch, as the objective calls it."""
        ...

    @property
    def sizes(self) -> DraftSizes: ...

    def edges(self) -> Iterable[nn.Parameter]:
        """Embeddings and heads, trained or not: Muon leaves them to AdamW."""
        ...

    def try_pass(self, batch: dict[str, torch.Tensor]) -> Any:
        """A forward pass over made-up tokens that keeps for its backward pass what one in training keeps."""
        ...

    def drafters(self, num_draft_tokens: int) -> dict[str, Drafter]:
        """What validation decodes with, by column of metrics.csv; they share the weights in training."""
        ...

    def layers(self) -> Iterable[nn.Module]:
        """Modules whose weights are read only while they run; where the draft is sharded, nobody else finds them
        whole."""
        ...

    def save(self, folder: Path, tokenizer: Any, template_fingerprint: str) -> None:
        """Write the finished draft."""
        ...


@dataclass(frozen=True, slots=True)
class BuildContext:
    """What a draft is built from.

    Args:
        target: the target's model on the CPU, which may lend modules but must not change.
        corpus: all samples, including held-out ones.
        dtype: of the weights in training.
        seed: the run's seed.
        checkpointing: recompute the activations inside layers.
        compile: compile each layer.
        trained_for: what the folder of a head says of its target.
        special_ids: the special tokens of its tokenizer.
    """

    target: Any
    corpus: Corpus
    dtype: torch.dtype
    seed: int = 0
    checkpointing: bool = False
    compile: bool = False
    trained_for: TrainedFor | None = None
    special_ids: Sequence[int] = ()


class DraftBuilder(Protocol):
    """Options of a kind of draft; run.json records its attributes."""

    def check(self, strategy: str, checkpointing: bool) -> None:
        """ValueError for options that do not fit together, or not to the run's; reads no file."""
        ...

    def build(self, run: BuildContext) -> Trainable: ...
