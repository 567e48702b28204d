"""The model card of an exported draft: what it was made from and how, measurements, usage, licence.

Everything in it comes from run.json, metrics.csv and benchmark results; the card says what is missing.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from draftsmith.infer.files.locations import is_hub_name
from draftsmith.infer.measure.bootstrap import without_small_samples
from draftsmith.infer.measure.report.runs import specs_by_label
from draftsmith.infer.measure.run_folder import machine

UNCOMPARED = (
    "The draft's tokenizer was not compared with that of `{target}`, which was not at hand. They must be the same: "
    "run `draftsmith bench`, which checks it."
)
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def front_matter(folder: Path) -> dict[str, Any]:
    """The YAML front matter of a model folder's README.md; empty if there is none."""
    readme = folder / "README.md"
    match = _FRONT.match(readme.read_text(encoding="utf-8")) if readme.is_file() else None
    found = yaml.safe_load(match[1]) if match else None
    return found if isinstance(found, dict) else {}


def licence_folder(target: str, reach: bool) -> Path | None:
    """The folder of the target's card and licence files: its own, or from the Hub (`reach`) or its cache; None if they
    cannot be had."""
    if Path(target).is_dir():
        return Path(target)
    if not is_hub_name(target):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = ["README.md", *LICENCE_FILES]
    try:
        return Path(snapshot_download(target, allow_patterns=wanted, local_files_only=not reach))
    except (OSError, ValueError, HfHubHTTPError):
        return None


def licence_of(folder: Path | None) -> dict[str, str]:
    """The target's licence as its model card states it; a draft made from its weights is under the same one."""
    found = front_matter(folder) if folder else {}
    return {key: str(found[key]) for key in ("license", "license_name", "license_link") if key in found}


def copy_licences(folder: Path | None, out: Path) -> list[str]:
    """Copy the target's licence files; their names."""
    if folder is None:
        return []
    paths = sorted({path for pattern in LICENCE_FILES for path in folder.glob(pattern) if path.is_file()})
    for path in paths:
        shutil.copyfile(path, out / path.name)
    return [path.name for path in paths]


@dataclass(frozen=True, slots=True)
class Made:
    """What a card is about: a sentence on `what` it is, how it is used, a draft model's `exit` (0 for heads)."""

    what: str
    usage: str
    exit: int = 0
    library: str = "transformers"
    tag: str = "draft-model"


def draft_model(name: str, target: str, exit: int, exits: Sequence[int]) -> Made:
    """A draft model of `exit` layers."""
    several = f", with exits after {_listed(exits)}." if len(exits) > 1 else "."
    what = f"A draft model for speculative decoding with `{shown(target)}`: {exit} layers{several}"
    return Made(what, _use(name, target, exits), exit)


def model_card(
    *,
    name: str,
    target: str,
    made: Made,
    run: dict[str, Any],
    bench: Benchmark | None,
    licence: dict[str, str],
    compared: bool,
) -> str:
    """The text of README.md. `run` is run.json, and may be empty; `compared`: the tokenizers are known to be equal."""
    head: dict[str, Any] = {**licence, "library_name": made.library, "pipeline_tag": "text-generation"}
    head["tags"] = ["speculative-decoding", made.tag, "draftsmith"]
    if not Path(target).is_absolute():
        head["base_model"] = target
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {name}",
        f"{made.what} An engine that verifies drafts keeps the target's output. Whether it decodes faster depends on "
        "the engine, the prompts and the machine: only what is listed below was measured.",
        "" if compared else UNCOMPARED.format(target=shown(target)),
        _measured(made.exit, target, run, bench),
        _recipe(run),
        made.usage,
        _licence(licence, run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The drafters' figures in results.json and run.json of a run folder; `run` is empty in old folders."""

    run: dict[str, Any]
    results: dict[str, Any]

    @property
    def target(self) -> str:
        return str((self.run.get("config") or {}).get("target") or "")

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Drafters that are made from a model; all drafters where run.json does not say what they are made from."""
        known = specs_by_label(str((self.run.get("config") or {}).get("drafters") or ""))
        for label, figures in (self.results.get("drafters") or {}).items():
            argument = known[label][1].argument if label in known else ""
            if figures.get("speedup") and label != "plain" and (argument or not known):
                yield label + (f" ({shown(argument)})" if argument else ""), without_small_samples(figures)

    def where(self) -> str:
        config = self.run.get("config") or {}
        parts = [f"with `{shown(self.target)}`" if self.target else "with a target that was not recorded"]
        parts.append(f"on {machine(self.run)}" if self.run else "on a machine that was not recorded")
        parts += [f"{self.results['questions']} questions"] if self.results.get("questions") else []
        parts += [f"{key} {config[key]}" for key in ("batch_size", "temperature", "max_new_tokens") if key in config]
        return ", ".join([*parts, str(self.run.get("date", ""))[:10]]).rstrip(", ")


def _measured(exit: int, target: str, run: dict[str, Any], bench: Benchmark | None) -> str:
    lines = []
    held_out = run.get("results") or {}
    settings = run.get("settings") or {}
    trained_for = settings.get("target") or target
    other = "" if shown(trained_for) == shown(target) else f", with `{shown(trained_for)}` as the target"
    if not exit and held_out.get("accepted_length"):
        lines.append(f"- accepted_length {held_out['accepted_length']:.2f} (held-out prompts{other})")
    for key in (key for key in held_out if key.startswith("accepted_length_exit_")):
        at = int(key.rpartition("_")[2])
        if at <= exit:
            depth = settings.get("watch", {}).get("num_draft_tokens")
            lines.append(
                f"- exit {at}: accepted_length {held_out[key]:.2f} (held-out prompts, chain of {depth}{other})"
            )
    rows = [_benchmark_line(label, figures) for label, figures in bench.rows()] if bench else []
    if bench and rows:
        lines += [*([""] if lines else []), f"Benchmark {bench.where()}:", "", *rows]
    else:
        lines += [*([""] if lines else []), "No speedup was measured."]
    hardware = (run.get("hardware") or {}).get("cpu", {}).get("model")
    gpus = [gpu["name"] for gpu in (run.get("hardware") or {}).get("gpus", [])]
    if gpus or hardware:
        lines += ["", f"Trained on {', '.join(gpus) or hardware}, {str(run.get('date', ''))[:10]}."]
    return "\n".join(["## What was measured", "", *lines])


def _benchmark_line(label: str, figures: dict[str, Any]) -> str:
    low, high = figures.get("speedup_interval") or (None, None)
    within = f"95 % interval {low:.2f} to {high:.2f}" if low is not None else "too few questions for an interval"
    length = figures.get("accepted_length")
    return f"- benchmark, `{label}`: {figures['speedup']:.2f}x plain decoding ({within})" + (
        f", accepted_length {length:.2f}" if length else ""
    )


def _recipe(run: dict[str, Any]) -> str:
    if not run:
        return "## How it was made\n\nThe checkpoint has no run.json: how it was made is unknown."
    settings = run.get("settings", {})
    rendering = run.get("data", {}).get("rendering", {})
    sources = ", ".join(f"`{shown(name)}`" for name in settings.get("data", []))
    learned = settings.get("objective", {}).get("name", "unknown")
    kept = {
        key: settings.get(key) for key in ("num_layers", "init", "freeze", "lora_rank", "seed") if settings.get(key)
    }
    return "\n".join(
        [
            "## How it was made",
            "",
            f"- objective: {learned}, {run.get('max_steps')} steps",
            f"- data: {sources}; {rendering.get('sequences')} sequences, {rendering.get('loss_tokens')} learned tokens",
            f"- template: {settings.get('text', {}).get('template')}",
            f"- optimiser: {json.dumps(settings.get('optim', {}))}",
            f"- draft: {json.dumps(kept)}",
            f"- draftsmith {run.get('versions', {}).get('draftsmith')}, revision {(run.get('git') or {}).get('sha')}",
        ]
    )


def _use(name: str, target: str, exits: Sequence[int]) -> str:
    target = shown(target)
    several = f"sd2:{name}" if len(exits) > 1 else f"small:{name}"
    return f"""## How to use it

These lines show how an engine takes the draft; they are no statement about its speed there.

transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{target}")
target = AutoModelForCausalLM.from_pretrained("{target}")
draft = AutoModelForCausalLM.from_pretrained("{name}")
inputs = tokenizer("Hello", return_tensors="pt")
target.generate(**inputs, assistant_model=draft, do_sample=False)
```

vLLM, which drafts a chain from the last layer:

```sh
{serve_line(name, target)}
```

Draftsmith:

```sh
draftsmith generate --target {target} --drafters {several} --prompt "Hello"
```"""


def _licence(licence: dict[str, str], run: dict[str, Any]) -> str:
    how = (run.get("settings") or {}).get("init")
    origin = {
        "first": "The weights began as the target's: the target's licence applies.",
        "even": "The weights began as the target's: the target's licence applies.",
        "fresh": "The weights began at random.",
    }.get(str(how), "Weights that began as the target's are under the target's licence.")
    named = licence.get("license_name") or licence.get("license")
    if named:
        return f"## Licence\n\n{origin} The target's licence: {named}."
    missing = "The target's licence could not be found where this card was written: look it up before you publish."
    return f"## Licence\n\n{origin} {missing}"


def speculative_config(name: str, method: str = "draft_model", num_draft_tokens: int = 5) -> dict[str, Any]:
    """The value of vLLM's --speculative-config."""
    return {"method": method, "model": name, "num_speculative_tokens": num_draft_tokens}


def serve_line(name: str, target: str, method: str = "draft_model", num_draft_tokens: int = 5) -> str:
    config = json.dumps(speculative_config(name, method, num_draft_tokens))
    return f"vllm serve {target} --speculative-config '{config}'"


def sglang_line(name: str, target: str, algorithm: str) -> str:
    return (
        f"python -m sglang.launch_server --model-path {target} --speculative-algorithm {algorithm} "
        f"--speculative-draft-model-path {name}"
    )


def shown(name: str) -> str:
    """The last part of a local path, which means nothing on another machine; a Hub name unchanged."""
    return Path(name).name if Path(name).is_absolute() or name.startswith((".", "~")) else name


def _listed(numbers: Sequence[int]) -> str:
    words = [str(number) for number in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
