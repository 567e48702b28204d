"""What large targets and stores would take, on paper: `python -m draftsmith.recipes.studies.devices.on_paper`

A roofline of the target's passes over several devices, and stores that grow as the measured ones did. Every constant is
an option; the defaults are figures of LOG.md, with the command that measured them. Nothing here was run at that size.
"""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from draftsmith.infer.costs.roofline import Work, load_machine, pass_cost
from draftsmith.infer.measure.plan.work import work_of
from draftsmith.recipes.studies import run_study

# What a device keeps for activations, graphs and the framework.
RESERVED = 0.1


def llama_70b() -> Any:
    """The shape of Llama 3 70B."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=8192,
    )  # fmt: skip


def split(work: Work, ranks: int) -> Work:
    """One rank's part of every pass: its share of each matrix, its own heads. The output head stays whole."""
    head = max(work.matrices)
    matrices = {weights // ranks: count for weights, count in work.matrices.items() if weights != head}
    matrices[head] = matrices.get(head, 0) + work.matrices[head]
    return replace(work, matrices=matrices, token_bytes=work.token_bytes // ranks, pair_flops=work.pair_flops // ranks)


def target_over(ranks: int, machine: str, exchange_us: float, context: int, nodes: Sequence[int]) -> dict[str, Any]:
    """A 70B target over `ranks` devices, in bfloat16."""
    figures = load_machine(machine)
    whole = work_of(llama_70b(), torch.bfloat16)
    part = split(whole, ranks)
    cost = pass_cost(figures, part)
    # The sums of attention and of the MLP, once per layer each.
    exchanges = 0.0 if ranks == 1 else 2 * whole.layers * exchange_us * 1e-6
    embedding = max(whole.matrices) * whole.itemsize  # whole on every device, as the head is
    weights = sum(size * count for size, count in part.matrices.items()) * part.itemsize + embedding
    room = figures.memory * (1 - RESERVED) - weights
    passes = {count: cost.even(1, count, context) + exchanges for count in (1, *nodes)}
    return {
        "machine": figures.name,
        "ranks": ranks,
        "weights_gb": weights / 1e9,
        "cache_mb_per_1k_tokens": part.token_bytes * 1000 / 1e6,
        "cached_tokens": int(max(room, 0) / part.token_bytes),
        "fits": room > 0,
        "pass_ms": {count: seconds * 1e3 for count, seconds in passes.items()},
        "exchanges_ms": exchanges * 1e3,
        "times_one_token": {count: passes[count] / passes[1] for count in nodes},
    }


def dresd_store(
    tokens: float, parameters: float, machine: str, kept: float, graph_bytes: float, cells_bytes: float, share: float
) -> dict[str, Any]:
    """A dense store of a target with `parameters` weights: every position goes through the target once."""
    figures = load_machine(machine)
    keys = tokens * kept
    return {
        "tokens": tokens,
        "keys": keys,
        "embed_device_hours": tokens * 2 * parameters / (share * figures.rate("bfloat16")) / 3600,
        "graph_gb": keys * graph_bytes / 1e9,
        "cells_gb": keys * cells_bytes / 1e9,
        "stream_gb": tokens * 4 / 1e9,
    }


def rest_store(
    tokens: float, bytes_per_token: float, build_s_per_million: float, segment: float, search_us: float
) -> dict[str, Any]:
    """A sparse store: `segment` tokens each, every one of them searched for every draft."""
    segments = tokens / segment
    return {
        "tokens": tokens,
        "segments": segments,
        "store_gb": tokens * bytes_per_token / 1e9,
        "build_core_hours": tokens / 1e6 * build_s_per_million / 3600,
        "propose_ms": segments * search_us / 1e3,
    }


def on_paper(
    *,
    machine: str = "h100",
    ranks: Sequence[int] = (2, 4, 8),
    exchange_us: float = 20.0,
    context: int = 4096,
    nodes: Sequence[int] = (8, 24, 60),
    dresd_tokens: float = 1e9,
    dresd_parameters: float = 8e9,
    dresd_kept: float = 0.673,
    dresd_graph_bytes: float = 528,
    dresd_cells_bytes: float = 32,
    embed_share: float = 0.4,
    rest_tokens: float = 100e9,
    rest_bytes: float = 8.0,
    rest_build_s: float = 0.239,
    rest_segment: float = 700e6,
    rest_search_us: float = 40.0,
    json: bool = False,
) -> None:
    """Print what a 70B target over several devices, a dense and a sparse store of these sizes would take.

    Args:
        machine: the device, as `plan --machine` takes it.
        ranks: numbers of devices that the target is split over.
        exchange_us: microseconds to add up one layer's results over the devices; assumed, and worth measuring first.
        context: committed tokens of the row.
        nodes: sizes of drafts.
        dresd_tokens: tokens of the dense store.
        dresd_parameters: weights of the target whose states it holds.
        dresd_kept: keys per position (64,577 of 95,980, `store build dresd`).
        dresd_graph_bytes: bytes per key of an HNSW index at 64 dimensions (`store quality`).
        dresd_cells_bytes: the same of IVF-PQ.
        embed_share: share of the device's arithmetic that embedding reaches; assumed.
        rest_tokens: tokens of the sparse store.
        rest_bytes: bytes per token: 4 of the stream (a vocabulary above 65,536) and 4 of the suffix array.
        rest_build_s: CPU seconds per million tokens (23.9 for 100, `studies.rest_scale`).
        rest_segment: tokens per segment: libdivsufsort sorts at most 2**31 - 1 bytes, of 3 bytes per token.
        rest_search_us: to search one segment: 0.27 ms for the 7 segments of 100 M tokens (`studies.rest_scale`).
        json: print one JSON object on the last line instead.
    """
    targets = [target_over(count, machine, exchange_us, context, nodes) for count in ranks]
    dense = dresd_store(
        dresd_tokens, dresd_parameters, machine, dresd_kept, dresd_graph_bytes, dresd_cells_bytes, embed_share
    )
    sparse = rest_store(rest_tokens, rest_bytes, rest_build_s, rest_segment, rest_search_us)
    if json:
        print(json_module.dumps({"targets": targets, "dresd": dense, "rest": sparse}))
        return
    print(f"a 70B target in bfloat16 over devices, one row behind {context} tokens, all modelled:")
    for one in targets:
        passes = ", ".join(f"{count}: {ms:.1f} ms" for count, ms in one["pass_ms"].items())
        fits = f"cache for {one['cached_tokens']:,} tokens" if one["fits"] else "does not fit"
        print(
            f"  {one['ranks']} x {one['machine']}: {one['weights_gb']:.1f} GB of weights each, {fits}; a pass over "
            f"{passes}; {one['exchanges_ms']:.1f} ms of that are exchanges"
        )
    print(
        f"a dense store of {dense['tokens']:,.0f} tokens: {dense['keys']:,.0f} keys, "
        f"{dense['embed_device_hours']:.1f} device hours to embed, {dense['cells_gb']:.1f} GB in cells or "
        f"{dense['graph_gb']:.0f} GB as a graph, {dense['stream_gb']:.0f} GB of tokens"
    )
    print(
        f"a sparse store of {sparse['tokens']:,.0f} tokens: {sparse['segments']:.0f} segments, "
        f"{sparse['store_gb']:.0f} GB, {sparse['build_core_hours']:.1f} core hours to build, "
        f"{sparse['propose_ms']:.1f} ms a draft from memory"
    )


if __name__ == "__main__":
    run_study(on_paper)
