"""What a pass costs beside what it must: `python -m draftsmith.recipes.studies.passes --out passes.json`.

On random models, since speed does not depend on what weights say: plain decoding against `model.generate` behind long
contexts, with grouped heads; a pass over one token against one over a tree, and behind a long context against a short
one; the share of the memory's read bandwidth that a pass over one token reaches; and the time to the first token behind
a prompt, again against `generate`. All ratios come from turns that
take place one after the other in one process; the context is pretended, not computed.

With `--batches`, instead: whole steps of the engine against `generate` with a static cache, which transformers compiles
on a CUDA device (elsewhere it runs as it is). Both read a prompt first, which is not timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.files.atomic import write_json
from draftsmith.infer.files.provenance import hardware
from draftsmith.infer.measure.metrics import Totals
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.load import choose_device
from draftsmith.infer.models.products.replace import own_products, replace_products
from draftsmith.infer.models.runner.entries import Entries

# Layers, hidden size, query heads, key/value heads, vocabulary. `30M` and `99M` are like the recipes' targets, `8B` is
# like Llama 3's, except that embedding and head share their weights, and `tiny` is for tests.
SHAPES = {
    "tiny": (2, 64, 4, 2, 256),
    "30M": (8, 512, 8, 8, 8192),
    "99M": (8, 1024, 16, 16, 12288),
    "378M": (24, 1024, 16, 16, 16384),
    "grouped": (8, 1024, 16, 4, 32000),
    "8B": (32, 4096, 32, 8, 128256),
}
INTERMEDIATE = {"8B": 14336}
NEW_TOKENS = 16
TREE = 16


def passes(
    *,
    out: str = "",
    shapes: Sequence[str] = ("grouped", "30M", "99M", "378M"),
    contexts: Sequence[int] = (256, 2048, 8192),
    dtype: str = "bfloat16",
    device: str = "auto",
    threads: int = 1,
    rounds: int = 5,
    batches: Sequence[int] = (),
    prompt: int = 256,
    steps: int = 64,
) -> dict[str, Any]:
    """Time passes of random models.

    Args:
        out: file for the figures.
        shapes: which of tiny, 30M, 99M, 378M, grouped (123M parameters, 16 query and 4 key/value heads) and 8B.
        contexts: committed tokens before a pass, of the grouped model.
        dtype: of the weights.
        device: cpu, cuda, or auto.
        threads: of torch.
        rounds: turns of every kind of pass.
        batches: batch sizes at which to time whole steps against `generate` with a static cache.
        prompt: tokens of each prompt there, and of the one whose first token is timed.
        steps: timed steps there.
    """
    torch.set_num_threads(threads)
    where = choose_device(device)
    found: dict[str, Any] = {"hardware": hardware(), "dtype": dtype, "threads": threads}
    found["bandwidth"] = bandwidth(where)
    print(f"reads {found['bandwidth'] / 1e9:.1f} GB/s on {threads} threads")
    for name in shapes:
        target = HFTarget(random_llama(name, getattr(torch, dtype), where))
        found[name] = against_limit(target, found["bandwidth"], rounds)
        print(
            f"{name}: {found[name]['seconds'] * 1e3:.1f} ms for one token, {found[name]['share']:.0%} of the limit, "
            f"buckets {list(target.buckets)}"
        )
        found[name]["first_token"] = first = first_token(target, prompt, rounds)
        print(
            f"first token behind {prompt}: {first['ours'] * 1e3:.1f} ms, generate {first['generate'] * 1e3:.1f} ms, "
            f"{first['ratio']:.2f}x"
        )
        if batches:
            found[name]["batches"] = {
                rows: beside_compiled(target, rows, prompt, steps, rounds, found["bandwidth"]) for rows in batches
            }
            report_batches(found[name]["batches"])
        if name == "grouped":
            found["contexts"] = {context: behind(target, context, rounds) for context in contexts}
            report(found["contexts"])
        if out:
            write_json(Path(out), found)
    return found


def random_llama(shape: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A random Llama-like model, packed as loaded ones are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, hidden, heads, groups, vocab = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=INTERMEDIATE.get(shape, hidden * 11 // 4),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=32768,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a large model is made where and as it will run, not copied there
    try:
        with device:
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    replace_products(model)
    return model


def bandwidth(device: torch.device) -> float:
    """Bytes per second at which this device reads memory, at best."""
    values = torch.ones(1 << 27, dtype=torch.float32, device=device)
    return values.nbytes / min(taken(lambda: values.sum().item()) for _ in range(5))


def taken(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def turns(arms: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median seconds of each arm; they take turns, and the first turn only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, arm in arms.items():
            one = arm()
            if turn:
                seconds[name].append(one)
    return {name: median(some) for name, some in seconds.items()}


def one_pass(target: HFTarget, row: object, tokens: int) -> float:
    """Seconds of a pass of one token and a tree below it, with the choices read."""
    began = time.perf_counter()
    output = target.lm.forward([row], [Entries([5] * tokens, [-1, *[0] * (tokens - 1)])])
    output.logits_NV.argmax(-1).tolist()
    seconds = time.perf_counter() - began
    target.lm.drop([row])
    return seconds


def against_limit(target: HFTarget, limit: float, rounds: int) -> dict[str, float]:
    """A pass of one token at a short context, and the share of the read bandwidth that it reaches."""
    row = object()
    target.lm.open(row, 128)
    target.lm.place([row], 64)
    seconds = turns({"": lambda: one_pass(target, row, 1)}, 3 * rounds)[""]
    target.lm.close(row)
    return {"seconds": seconds, "share": target.lm.weight_bytes / seconds / limit}


def first_token(target: HFTarget, prompt: int, rounds: int) -> dict[str, float]:
    """Seconds to the first token behind a prompt, ours and of `generate`. `ratio`: the median over turns."""
    ids = [3 + 7 * i % 200 for i in range(prompt)]
    ids_1T = torch.tensor([ids], device=target.lm.device)
    options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False}
    waits: list[float] = []
    ratios: list[float] = []

    def ours() -> float:
        (done,) = generate(target, Empty(), [Row("0", ids, Settings(), Stops(1))])
        waits.append(done.first_s)
        return done.first_s

    def theirs() -> float:
        with own_products(target.model):
            asked = {"attention_mask": torch.ones_like(ids_1T), **options}
            spent = taken(lambda: target.model.generate(ids_1T, **asked).tolist())
        ratios.append(spent / waits[-1])
        return spent

    found = turns({"ours": ours, "generate": theirs}, 3 * rounds)
    return {**found, "ratio": median(ratios[1:])}


def behind(target: HFTarget, context: int, rounds: int) -> dict[str, float]:
    """Seconds per token of `generate` and of our plain passes, and of a tree, behind `context` tokens."""
    row = object()
    target.lm.open(row, context + 64)
    target.lm.place([row], context)
    ids_1T = torch.full((1, context + 1), 5, device=target.lm.device)

    def theirs() -> float:
        cache = pretended(target.model, context)
        began = time.perf_counter()
        with own_products(target.model):
            target.model.generate(
                ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                past_key_values=cache,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
        return (time.perf_counter() - began) / NEW_TOKENS

    found = turns(
        {
            "generate": theirs,
            "plain": lambda: sum(one_pass(target, row, 1) for _ in range(4)) / 4,
            "tree": lambda: one_pass(target, row, TREE),
        },
        rounds,
    )
    target.lm.close(row)
    return found


def beside_compiled(
    target: HFTarget, rows: int, prompt: int, steps: int, rounds: int, limit: float
) -> dict[str, float]:
    """Seconds per step of `rows` rows: ours, and of `generate` with a static cache, from the difference of two
    lengths."""
    ids = [[3 + (7 * i + row) % 200 for i in range(prompt)] for row in range(rows)]
    ids_BT = torch.tensor(ids, device=target.lm.device)
    overheads: list[float] = []

    def ours() -> float:
        decoding = [Row(str(i), list(one), Settings(), Stops(steps + 1)) for i, one in enumerate(ids)]
        totals = Totals.of(
            [trace for one in generate(target, Empty(), decoding, batch_size=rows) for trace in one.traces]
        )
        overheads.append(totals.overhead or 0.0)
        return totals.step_s or 0.0

    def static(count: int) -> float:
        options = {
            "max_new_tokens": count,
            "min_new_tokens": count,
            "do_sample": False,
            "cache_implementation": "static",
        }
        with own_products(target.model):
            asked = {"attention_mask": torch.ones_like(ids_BT), **options}
            return taken(lambda: target.model.generate(ids_BT, **asked).tolist())

    first = 2
    found = turns({"ours": ours, "static": lambda: (static(first + steps) - static(first)) / steps}, rounds)
    return {
        **found,
        "ratio": found["static"] / found["ours"],
        "share": target.lm.weight_bytes / found["ours"] / limit,
        "overhead": median(overheads[1:]),
    }


def report_batches(batches: dict[int, dict[str, float]]) -> None:
    print(f"{'rows':>8} {'static cache':>13} {'ours':>9} {'ratio':>6} {'of the limit':>13} {'overhead':>9}")
    for rows, found in batches.items():
        print(
            f"{rows:>8} {found['static'] * 1e3:>10.2f} ms {found['ours'] * 1e3:>6.2f} ms {found['ratio']:>5.2f}x "
            f"{found['share']:>13.0%} {found['overhead']:>9.1%}"
        )


def pretended(model: Any, context: int) -> Any:
    """transformers' own cache, filled with `context` tokens that were never computed."""
    from transformers import DynamicCache

    config = model.config
    cache = DynamicCache(config=config)
    weight = next(model.parameters())
    size = config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        shape = (1, config.num_key_value_heads, context, size)
        cache.update(weight.new_zeros(shape), weight.new_zeros(shape), layer)
    return cache


def report(contexts: dict[int, dict[str, float]]) -> None:
    first = next(iter(contexts.values()))
    print(f"{'context':>8} {'generate':>10} {'plain':>8} {'ratio':>6} {'of the first':>13} {f'tree of {TREE}':>11}")
    for context, seconds in contexts.items():
        print(
            f"{context:>8} {seconds['generate'] * 1e3:>7.1f} ms {seconds['plain'] * 1e3:>5.1f} ms "
            f"{seconds['generate'] / seconds['plain']:>5.2f}x {seconds['plain'] / first['plain']:>12.2f}x "
            f"{seconds['tree'] / seconds['plain']:>10.2f}x"
        )


if __name__ == "__main__":
    from draftsmith.recipes.studies import run_study

    run_study(passes)
