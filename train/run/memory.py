"""An estimate of a run's memory on one device before it starts.

Counted: weights, the target that stays loaded, gradients, optimiser, what the draft keeps for its backward pass
(measured on a few tokens, scaled to a micro-batch), the loss, what a sharded run gathers and, on a CPU, the process
with its libraries and what only loading and saving need. Not counted: the workers that assemble batches, which share
most pages of the process.

Legend: B rows, T positions of a row, D hidden, V vocabulary.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from draftsmith.infer.models.layers import find_parts
from draftsmith.train.drafts.trainable import Trainable
from draftsmith.train.objectives.chunked_loss import CHUNK_ENTRIES, CHUNK_ENTRIES_CUDA

MEASURED_LENGTHS = (32, 128)
# In the order in which strategies split them.
SHARDED_PARTS = ("optimiser", "gradients", "weights")
# What the libraries and the allocator add once models are loaded and trained; measured, torch 2.13 on a CPU.
LOADED_LATER = 100 << 20


def memory_estimate(
    draft: Trainable,
    *,
    rows: int,
    length: int,
    optimiser: str,
    autocast: torch.dtype | None,
    checkpointing: bool,
    cuda: bool,
    strategy: str = "auto",
    ranks: int = 1,
    target: Any = None,
    process: int = 0,
    loaded: int = 0,
) -> dict[str, float]:
    """GiB by part, on one of `ranks` devices; of `offloaded`, which is not in the total, in the machine's memory.
    `autocast`: the dtype of mixed precision; `target`: the target's model, if it is in this device's memory; `process`:
    resident_bytes() before it was loaded; `loaded`: what it took then."""
    sizes = draft.sizes
    shards = shards_of(strategy, ranks)
    trained = [weight for weight in draft.parameters() if weight.requires_grad]
    states = sum(bytes_of([weight]) * (1 if optimiser == "muon" and weight.ndim == 2 else 2) for weight in trained)
    fixed, kept = _kept(draft, rows, length, autocast)
    if checkpointing:
        width = 4 if autocast is None else autocast.itemsize
        inputs = rows * length * sizes.width * width * sizes.layers
        kept = kept / sizes.layers + inputs
    # The heads' gradients; a chunk's logits and slope, and the slope in the dtype of the product.
    entries = min(CHUNK_ENTRIES_CUDA if cuda else CHUNK_ENTRIES, rows * length * sizes.vocab_size)
    heads = sizes.heads * sizes.vocab_size * sizes.width * 4
    loss = heads + entries * (4 + 4 + 2)
    # In the backward pass instead: the gradients of a layer's widest activations.
    backward = heads + rows * length * sizes.widest * 3 * 4
    weights = bytes_of(draft.parameters())
    theirs = 0 if target is None else bytes_of(target.parameters())
    parts = {
        "weights": weights / shards.get("weights", 1),
        "target": theirs,
        "gradients": bytes_of(trained) / shards.get("gradients", 1),
        "optimiser": states / shards.get("optimiser", 1),
        "activations": fixed + kept,
        "features": rows * length * sizes.feature_bytes,
        "loss": max(loss, backward),
    }
    held = parts["weights"] + parts["gradients"] + parts["optimiser"]
    if strategy.startswith("fsdp"):
        busy = parts["activations"] + parts["features"] + parts["loss"]
        parts["target"], layer = (0, 0) if target is None else _split(target, ranks)
        parts["gathered"] = _gathered(draft, layer, busy)
    offloaded = {name: parts.pop(name) for name in offloaded_parts(strategy)}
    if not cuda:
        parts["process"] = process + LOADED_LATER
        if ranks > 1 and shards:
            # Each rank loads everything before it is split, and the first one gathers it to save it.
            whole = parts["process"] + max(loaded + weights, parts["target"] + held + weights)
            parts["loading"] = max(whole - sum(parts.values()), 0)
    parts["total"] = sum(parts.values())
    if offloaded:
        parts["offloaded"] = sum(offloaded.values())
    return {name: round(size / 2**30, 3) for name, size in parts.items()}


def _split(target: Any, ranks: int) -> tuple[float, int]:
    """Bytes of a frozen target whose layers are split over `ranks`, and of its largest layer."""
    layers = [bytes_of(layer.parameters()) for layer in find_parts(target).layers]
    return bytes_of(target.parameters()) - sum(layers) * (1 - 1 / ranks), max(layers)


def _gathered(draft: Trainable, frozen_layer: int, busy: float) -> float:
    """Bytes that fully_shard gathers at once: the weights outside the layers for a whole micro-batch, and beside `busy`
    bytes of activations and loss some layers' weights and gradients, or when these are gone, all other gradients."""
    layers = [list(layer.parameters()) for layer in draft.layers()]
    inside = {id(weight) for layer in layers for weight in layer}
    outside = [weight for weight in draft.parameters() if id(weight) not in inside]
    layer = max((bytes_of(layer) for layer in layers), default=0)
    # This layer and the next; its gradients, also as they are sent. Gradients outside wait for the end.
    while_running = max(4 * layer, 2 * frozen_layer)
    at_the_end = 2 * bytes_of(weight for weight in outside if weight.requires_grad) - busy
    return bytes_of(outside) + max(while_running, at_the_end)


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def resident_bytes() -> int:
    """This process's memory; 0 where the system does not say."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.is_file() else 0


def _kept(draft: Trainable, rows: int, length: int, autocast: torch.dtype | None) -> tuple[float, float]:
    """Bytes that a micro-batch keeps for its backward pass: (independent of its size, such as weights in the dtype of
    mixed precision; the rest). They grow with T, apart from each layer's mask of packed rows, T x T.
    """
    sizes = draft.sizes
    weight = next(draft.parameters())
    device = weight.device
    training = draft.training
    draft.eval()  # neither dropout nor recomputed layers

    def measure(size: int) -> int:
        positions_1T = torch.arange(size, device=device)[None] % (size // 2)  # two documents
        ids_1T = positions_1T % sizes.vocab_size
        batch = {"input_ids": ids_1T, "position_ids": positions_1T, "labels": ids_1T}
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            return saved_bytes(draft, lambda: draft.try_pass(batch))

    mask = sizes.layers * (weight.element_size() if autocast is None else autocast.itemsize)
    short, long = MEASURED_LENGTHS
    try:
        with torch.random.fork_rng(), torch.compiler.set_stance("force_eager"), torch.enable_grad():
            least, most = measure(short), measure(long)
    finally:
        draft.train(training)
    each = (most - least - mask * (long**2 - short**2)) / (long - short)
    return max(least - each * short, 0.0), rows * (each * length + mask * length**2)


class _Saved:
    """A tensor that the graph keeps; it lives as long as its place in the graph."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()  # a result that its own graph keeps would keep the graph, too


def saved_bytes(module: Trainable | torch.nn.Module, run: Callable[[], Any]) -> int:
    """Bytes of the tensors that `run` saves for its backward pass, the module's own weights left out.

    Only what is still there when `run` has ended: outputs that nobody uses are freed with what their graph saved.
    """
    own = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
    kept: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> _Saved:
        saved = _Saved(tensor)
        kept.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        output = run()
    storages = [saved.tensor.untyped_storage() for saved in kept]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    del output  # until here, the graph keeps what it saved
    return sum(size for place, size in sizes.items() if place not in own)


def shards_of(strategy: str, devices: int) -> dict[str, int]:
    """The parts that a strategy shards, with the number of devices."""
    parts = {"fsdp": 3, "fsdp_cpu": 3, "deepspeed_stage_3": 3, "deepspeed_stage_2": 2}
    return dict.fromkeys(SHARDED_PARTS[: parts.get(strategy.removesuffix("_offload"), 0)], devices)


def offloaded_parts(strategy: str) -> tuple[str, ...]:
    """The parts that a strategy keeps in the machine's memory."""
    return tuple(shards_of(strategy, 1)) if strategy.endswith("_offload") else ()
