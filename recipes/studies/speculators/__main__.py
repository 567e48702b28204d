"""speculators' EAGLE-3 folders here, and ours there: equal logits, for every setting of the switches.

    python -m draftsmith.recipes.studies.speculators --out DIR

speculators (PyPI) is installed with the pinned torch into an environment under DIR, which takes minutes once. There
tiny random heads are made, saved and unrolled over a text; here they are loaded and stepped with a cache. Heads that
are made and saved here are loaded and unrolled there.
"""

from __future__ import annotations

import itertools
import json as json_module
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, LlamaConfig, LlamaForCausalLM

from draftsmith.infer.heads.eagle import EagleDesign, EagleHead, rows_of
from draftsmith.infer.heads.folders import TrainedFor, load_eagle, save_eagle
from draftsmith.recipes.studies import run_study
from draftsmith.recipes.studies.speculators.stepping import stepped

VERSION = "0.9.0"
SWITCHES = ("norm_before_residual", "norm_before_fc", "norm_output")
SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
}  # fmt: skip
LAYER_IDS = [2, 4, 5]
# Of the largest difference of two logits over the logits' standard deviation.
TOLERANCE = 1e-4


def against_speculators(*, out: str, pairs: int = 24, steps: int = 3, seed: int = 0, json: bool = False) -> None:
    """Compare heads with speculators in all settings of its switches, whole and partial vocabularies.

    Args:
        out: folder for the environment, the heads and what they say.
        pairs: of the text that heads are unrolled over.
        steps: of the unrolled pass.
        seed: of weights and inputs.
        json: print one JSON object on the last line.
    """
    folder = Path(out).resolve()
    python = environment(folder / "venv")
    theirs = [case | {"made": "there"} for case in _cases(folder / "theirs", pairs, steps, seed)]
    ours = [case | {"made": "here"} for case in _cases(folder / "ours", pairs, steps, seed + 1)]
    # speculators loads a head only beside the target that its config names.
    target = TrainedFor(str(folder / "target"), num_layers=8, architecture="LlamaForCausalLM")
    LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": 8})).save_pretrained(target.name)
    for case in ours:
        head = _random_head(case)
        save_eagle(Path(case["folder"]), head, target, "speculators", steps)
        save_eagle(Path(case["flat"]), head, target)
    _there(python, "make", folder / "theirs" / "cases.json", theirs)
    _there(python, "run", folder / "ours" / "cases.json", ours)
    results = [_compared(case) for case in (*theirs, *ours)]
    for result in results:
        print(f"{result['made']:5}  {result['setting']:76}  {result['error']:.1e}")
    worst = max(result["error"] for result in results)
    print(f"{len(results)} heads, K {steps}: logits differ by at most {worst:.1e} of their standard deviation")
    if json:
        print(json_module.dumps({"heads": results, "worst": worst, "speculators": VERSION}))
    if not worst < TOLERANCE:
        raise ValueError(f"a head says other things here than in speculators {VERSION}: {worst:.2g} > {TOLERANCE}")


def environment(folder: Path) -> Path:
    """The Python of an environment with speculators, which is set up if it is not there."""
    python = folder / "bin" / "python"
    ready = folder / f".speculators-{VERSION}"
    if not ready.exists():
        print(f"installing speculators {VERSION} into {folder}", file=sys.stderr)
        torch_version = metadata.version("torch").partition("+")[0]
        commands = [
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(python), "-m", "pip", "-qq", "install", f"torch=={torch_version}"],
            [str(python), "-m", "pip", "-qq", "install", f"torch=={torch_version}", f"speculators=={VERSION}"],
            # Their builds need not fit a CPU's torch, and transformers imports them where they are.
            [str(python), "-m", "pip", "-qq", "uninstall", "-y", "torchvision", "torchaudio"],
        ]
        for command in commands:
            _called(command)
        ready.touch()
    return python


def _cases(folder: Path, pairs: int, steps: int, seed: int) -> list[dict[str, Any]]:
    """All settings of the switches with part of the vocabulary, one with all of it, and one of Qwen3's layers."""
    folder.mkdir(parents=True, exist_ok=True)
    every = [dict(zip(SWITCHES, on)) for on in itertools.product((False, True), repeat=len(SWITCHES))]
    settings: list[tuple[str, dict[str, bool], int]] = [("llama", switches, 20) for switches in every]
    settings += [("llama", {"fc_norm": True}, 20), ("llama", {}, SIZES["vocab_size"]), ("qwen3", every[-1], 20)]
    cases = []
    for number, (layers, switches, draft_vocab_size) in enumerate(settings):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        inputs = folder / f"{number}.inputs.safetensors"
        save_file(
            {
                "features": torch.randn((pairs, 3 * SIZES["hidden_size"]), generator=generator),
                "tokens": torch.randint(SIZES["vocab_size"], (pairs,), generator=generator),
            },
            inputs,
        )
        cases.append(
            {
                "folder": str(folder / f"{number}"), "flat": str(folder / f"{number}.flat"), "inputs": str(inputs),
                "outputs": str(folder / f"{number}.outputs.safetensors"), "layers": layers,
                "switches": switches, "sizes": SIZES, "layer_ids": LAYER_IDS,
                "draft_vocab_size": draft_vocab_size, "steps": steps,
                "seed": 1000 * seed + number,
            }
        )  # fmt: skip
    return cases


def _random_head(case: dict[str, Any]) -> EagleHead:
    vocab_size, drafted = SIZES["vocab_size"], case["draft_vocab_size"]
    design = EagleDesign(3, tuple(f"layer:{i}" for i in LAYER_IDS), SIZES["hidden_size"], **case["switches"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case["seed"])
        ids_V = rows_of(torch.randperm(vocab_size)[:drafted].tolist(), vocab_size) if drafted < vocab_size else None
        head = EagleHead(CONFIG_MAPPING[case["layers"]](**SIZES), design, ids_V, own_embedding=True)
        for name, parameter in head.named_parameters():
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    return head.eval()


def _there(python: Path, action: str, path: Path, cases: Sequence[dict[str, Any]]) -> None:
    path.write_text(json_module.dumps(cases), encoding="utf-8")
    _called([str(python), str(Path(__file__).with_name("peer.py")), action, str(path)])


def _called(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{' '.join(command)} ended with {done.returncode}: {last}")


def _compared(case: dict[str, Any]) -> dict[str, Any]:
    """The largest difference between what a head says there, unrolled, and here, stepped; for a head that was made
    here, from both formats."""
    inputs, said = load_file(case["inputs"]), load_file(case["outputs"])
    error = 0.0
    for folder in [case["folder"]] + ([case["flat"]] if case["made"] == "here" else []):
        head = load_eagle(folder)
        for step, logits_NV in enumerate(stepped(head, inputs["features"], inputs["tokens"], case["steps"])):
            expected = said[f"logits.{step}"][: len(logits_NV)]
            error = max(error, float((logits_NV - expected).abs().max() / expected.std()))
    named = [name for name, on in case["switches"].items() if on]
    setting = (
        f"{case['layers']}; {case['draft_vocab_size']} of {SIZES['vocab_size']} ids; {', '.join(named) or 'no switch'}"
    )
    return {"made": case["made"], "setting": setting, "error": error}


if __name__ == "__main__":
    run_study(against_speculators)
