"""transformers' `tp_plan` against DeepSpeed's AutoTP: `python -m draftsmith.recipes.studies.devices.engines`

Both split one random model over processes with gloo on this machine's CPU, and both are run by our runner. Loading is
measured in fresh processes for each, as the peak of each rank's memory above what it held before. Passes are timed with
both models in the same processes, in turns, behind a barrier; the figures are rank 0's medians and minima.

DeepSpeed (the extra `deepspeed`) may be missing: then only tp_plan is measured. Gloo on a CPU says little about NCCL.
"""

from __future__ import annotations

import json as json_module
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from draftsmith.infer.files.provenance import hardware
from draftsmith.infer.models.architectures import prepare
from draftsmith.infer.models.pass_timer import CachedPassTimer
from draftsmith.infer.models.tensor_parallel.launch import own_runner
from draftsmith.infer.models.tensor_parallel.sharding import load_shard
from draftsmith.recipes.studies import run_study
from draftsmith.recipes.studies.devices.random_target import random_folder

TP_PLAN, AUTO_TP = "tp_plan", "AutoTP"
CONTEXT = 64


def load(engine: str, folder: str, ranks: int, shm: bool) -> Any:
    """This rank's share of the model, ready to be run."""
    if engine == TP_PLAN:
        return load_shard(folder, "float32").model
    import deepspeed
    from transformers import AutoModelForCausalLM

    if not shm:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    split = deepspeed.init_inference(
        model, tensor_parallel={"tp_size": ranks}, dtype=torch.float32, replace_with_kernel_inject=False
    )
    return split.module


def memory(field: str) -> int:
    """Bytes that this process holds (VmRSS), or has held at most (VmHWM); Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def load_once(engine: str, folder: str, ranks: int, shm: bool) -> dict[str, Any]:
    """Seconds and bytes of loading in a fresh process."""
    if engine == AUTO_TP:
        import deepspeed  # noqa: F401 (its own memory is not the model's)
    before, began = memory("VmRSS"), time.perf_counter()
    model = load(engine, folder, ranks, shm)
    taken = time.perf_counter() - began
    held = sum(parameter.nbytes for parameter in model.parameters())
    return {"seconds": taken, "peak_bytes": memory("VmHWM") - before, "held_bytes": held}


def time_passes(
    engines: Sequence[str], folder: str, ranks: int, shm: bool, tokens: Sequence[int], turns: int
) -> dict[str, Any]:
    """Seconds of every pass by engine and number of tokens, in turns, and how far their logits differ."""
    timers, logits = {}, []
    for engine in engines:
        model = load(engine, folder, ranks, shm)
        with torch.no_grad():
            logits.append(model(input_ids=torch.arange(3, 19)[None], use_cache=False).logits)
        timers[engine] = CachedPassTimer(own_runner(model, prepare(model)))
        timers[engine].place(1, CONTEXT)
    found: dict[str, dict[int, list[float]]] = {engine: {count: [] for count in tokens} for engine in engines}
    for turn in range(turns + 2):
        for count in tokens:
            for engine, timer in timers.items():
                dist.barrier()
                began = time.perf_counter()
                timer.run(count)
                if turn > 1:
                    found[engine][count].append(time.perf_counter() - began)
    return {"seconds": found, "logits_differ_by": float((logits[0] - logits[-1]).abs().max() / logits[0].std())}


def rank_main(rank: int, ranks: int, port: int, out: str, work: str, given: dict[str, Any]) -> None:
    """One process. Its result goes to OUT/RANK.json."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.dup2(2, 1)  # gloo and DeepSpeed write lines to standard output
    store = dist.TCPStore("127.0.0.1", port, ranks, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    found = load_once(ranks=ranks, **given) if work == "load" else time_passes(ranks=ranks, **given)
    (Path(out) / f"{rank}.json").write_text(json_module.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def together(work: str, ranks: int, **given: Any) -> list[dict[str, Any]]:
    """What each of `ranks` processes found."""
    store = dist.TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as out:
        torch.multiprocessing.spawn(rank_main, (ranks, store.port, out, work, given), nprocs=ranks)
        return [json_module.loads((Path(out) / f"{rank}.json").read_text()) for rank in range(ranks)]


def engines(
    *,
    shape: str = "30M",
    target: str = "",
    tp: int = 2,
    tokens: Sequence[int] = (1, 8, 32),
    turns: int = 30,
    shm: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Load one model with each engine over ranks, and time its passes.

    Args:
        shape: of a random model, as studies.passes names it.
        target: a folder instead.
        tp: the ranks.
        tokens: numbers of tokens of a pass.
        turns: how often each pass is timed.
        shm: let DeepSpeed sum in shared memory, where ranks wait by spinning: give each a core of its own. By default
            it sums over gloo, as tp_plan does.
        json: print one JSON object on the last line instead.
    """
    chosen = [TP_PLAN, AUTO_TP]
    if find_spec("deepspeed") is None:
        chosen.remove(AUTO_TP)
        print("DeepSpeed is not installed (pip install '.[deepspeed]'): only tp_plan is measured", file=sys.stderr)
    figures: dict[str, Any] = {"hardware": hardware(), "tp": tp, "engines": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = target or random_folder(shape, Path(scratch))
        for engine in chosen:
            figures["engines"][engine] = {"load": together("load", tp, engine=engine, folder=folder, shm=shm)}
        timed = together("time", tp, engines=chosen, folder=folder, shm=shm, tokens=tuple(tokens), turns=turns)[0]
    for engine in chosen:
        passes = timed["seconds"][engine]
        for name, chosen_one in (("pass_ms", statistics.median), ("fastest_ms", min)):
            figures["engines"][engine][name] = {
                int(count): chosen_one(seconds) * 1e3 for count, seconds in passes.items()
            }
    figures["logits_differ_by"] = timed["logits_differ_by"]
    if json:
        print(json_module.dumps(figures))
        return figures
    for engine, found in figures["engines"].items():
        fastest = found["fastest_ms"]
        passes = ", ".join(
            f"{count}: {ms:.1f} ms (at least {fastest[count]:.1f})" for count, ms in found["pass_ms"].items()
        )
        peaks = " and ".join(f"{one['peak_bytes'] / 1e6:.0f}" for one in found["load"])
        held = " and ".join(f"{one['held_bytes'] / 1e6:.0f}" for one in found["load"])
        print(f"{engine}: passes by tokens, {passes}")
        print(f"  loads in {found['load'][0]['seconds']:.1f} s; {peaks} MB at the peak, {held} MB of weights kept")
    if len(chosen) > 1:
        print(f"logits differ by {figures['logits_differ_by']:.1e} of their standard deviation")
    return figures


if __name__ == "__main__":
    run_study(engines)
