"""A head as a folder that an engine takes, with a model card; what an engine would get wrong in silence is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from draftsmith.infer.files.locations import is_hub_name, may_be_on_hub
from draftsmith.infer.heads.eagle import EagleHead, default_features
from draftsmith.infer.heads.folders import (
    Kind,
    TrainedFor,
    load_eagle,
    load_hydra,
    load_medusa,
    save_eagle,
    save_hydra,
    save_medusa,
    trained_for,
)
from draftsmith.infer.text.tokenizer import tokenizer_fingerprint
from draftsmith.train.export.card import (
    Made,
    copy_licences,
    licence_folder,
    licence_of,
    model_card,
    serve_line,
    sglang_line,
    shown,
    speculative_config,
)
from draftsmith.train.export.export import check_outputs, read_benchmark, read_json, tokenizer_of

LOAD = {"eagle": load_eagle, "medusa": load_medusa, "hydra": load_hydra}
TITLES = {"eagle": "An EAGLE head", "medusa": "Medusa heads", "hydra": "Hydra heads"}


def export_head(
    checkpoint: str,
    out: Path,
    kind: Kind,
    *,
    target: str | None = None,
    dtype: str | None = None,
    engine: str | None = None,
    bench: str | None = None,
    name: str | None = None,
    reach: bool = True,
) -> dict[str, Any]:
    """Write the new folder `out`; returns a summary of it. The arguments are those of `export_draft`."""
    check_outputs(out, dtype, engine)
    run = read_json(Path(checkpoint) / "run.json")
    origin = trained_for(checkpoint) or TrainedFor()
    target = target or run.get("settings", {}).get("target") or origin.name
    if not target:
        raise ValueError(f"{checkpoint} does not say what target it drafts for: give --target")
    if target != origin.name and not (Path(target).expanduser().is_dir() or may_be_on_hub(target)):
        raise ValueError(f"{target} does not exist, and is not a Hub name (owner/model): give the target's folder")
    benchmark = read_benchmark(bench, target) if bench else None
    config = config_of(target, reach)
    head = LOAD[kind](checkpoint, config, dtype or "auto")
    compared = _compare(checkpoint, origin, target, reach)
    if config is not None:
        layers, classes = int(config.get_text_config().num_hidden_layers), config.architectures or [""]
        # speculators looks the target up by this name; elsewhere it is for people.
        called = target if engine == "speculators" else shown(target)
        origin = TrainedFor(called, origin.fingerprint, origin.tokenizer, layers, classes[0])
    title = name or out.name
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        serve = _write(part, kind, head, origin, engine, title, target)
        source = licence_folder(target, reach)
        licence = licence_of(source)
        made = _made(kind, head, title, target, serve and serve.replace(target, shown(target)))
        card = model_card(
            name=title, target=target, made=made, run=run, bench=benchmark, licence=licence, compared=compared
        )
        (part / "README.md").write_text(card, encoding="utf-8")
        licences = copy_licences(source, part)
        if run:
            shutil.copyfile(Path(checkpoint) / "run.json", part / "run.json")
        if out.exists():
            out.rmdir()
        os.replace(part, out)
    except OSError as error:
        raise ValueError(f"{out} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    facts = {"head": kind, "licence": licence, "compared": compared, "licence_files": licences}
    return {**facts, **({"serve": serve} if serve else {}), "files": sorted(path.name for path in out.iterdir())}


def config_of(target: str, reach: bool) -> Any | None:
    """The target's config; None if it is not at hand."""
    from transformers import AutoConfig

    folder = Path(target).expanduser()
    if not (folder / "config.json").is_file() and (folder.is_dir() or not is_hub_name(target)):
        return None
    try:
        return AutoConfig.from_pretrained(str(folder) if folder.is_dir() else target, local_files_only=not reach)
    except (OSError, ValueError, KeyError):
        return None


def _compare(checkpoint: str, origin: TrainedFor, target: str, reach: bool) -> bool:
    """Refuse a target with another tokenizer than the head was trained with; False where neither is at hand."""
    tokenizer = tokenizer_of(target, reach) if origin.tokenizer else None
    if tokenizer is None:
        return False
    if tokenizer_fingerprint(tokenizer) != origin.tokenizer:
        raise ValueError(f"{checkpoint} cannot draft for {target}: it was trained with another tokenizer")
    return True


def _write(
    part: Path, kind: Kind, head: Any, origin: TrainedFor, engine: str | None, title: str, target: str
) -> str | None:
    """Write the head; returns the command by which `engine` serves it."""
    if engine == "transformers":
        raise ValueError(
            "transformers takes whole models as assistants, and no heads: leave --engine out, or train small"
        )
    if kind == "eagle":
        return _write_eagle(part, head, origin, engine, title, target)
    if engine:
        raise ValueError(_no_engine(kind, engine))
    save = save_medusa if kind == "medusa" else save_hydra
    save(part, head, origin)
    return None


def _no_engine(kind: Kind, engine: str) -> str:
    if kind == "hydra":
        return f"{engine} has no Hydra heads: leave --engine out"
    gone = "vLLM has dropped Medusa heads" if engine == "vllm" else f"{engine} has no Medusa heads"
    return f"{gone}: leave --engine out for the format that TGI and TensorRT-LLM read"


def _write_eagle(
    part: Path, head: EagleHead, origin: TrainedFor, engine: str | None, title: str, target: str
) -> str | None:
    refused = refusals(head, engine)
    if refused:
        raise ValueError(f"{engine} cannot run this head: {'; '.join(refused)}")
    save_eagle(part, head, origin, "speculators" if engine == "speculators" else "flat")
    method = "eagle3" if head.design.version == 3 else "eagle"
    if engine == "sglang":
        _adapt_to_sglang(part, head, origin.num_layers)
        return sglang_line(title, target, method.upper())
    if engine == "vllm":
        config = speculative_config(title, method)
        (part / "speculative_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return serve_line(title, target, method)
    return None


def refusals(head: EagleHead, engine: str | None) -> list[str]:
    """Why `engine` would draft something else with this head, and say nothing."""
    design, found = head.design, []
    if engine in ("vllm", "sglang") and design.version == 3 and head.lm_head is None:
        found.append("it has no lm_head of its own")
    if engine in ("vllm", "sglang") and head.config.model_type != "llama":
        found.append(f"its layers are {head.config.model_type}'s, and Llama's are built there")
    if engine == "vllm" and design.fc_bias:
        found.append("its fc has a bias, and vLLM's has none")
    if engine == "sglang" and design.version == 3:
        switches = [name for name in ("norm_before_residual", "norm_before_fc") if getattr(design, name)]
        if switches:
            found.append(f"{' and '.join(switches)} is not read there")
        if head.config.num_hidden_layers > 1:
            found.append(f"it has {head.config.num_hidden_layers} layers, whose norms are used otherwise there")
        if head.config.attention_bias:
            found.append("its attention has biases")
        if "layer:0" in design.features:
            found.append("it reads the embeddings (layer:0), which no layer id names there")
    return found


def _adapt_to_sglang(part: Path, head: EagleHead, num_layers: int) -> None:
    """SGLang counts the states after layers, reads their numbers in `eagle_config` only, and gives fc of version 1 a
    bias always."""
    from safetensors.torch import load_file, save_file

    path, weights = part / "config.json", part / "model.safetensors"
    config = read_json(path)
    before = config.pop("eagle_aux_hidden_state_layer_ids", None)
    if before and not (num_layers and head.features == default_features(num_layers)):
        ids = [number - 1 for number in before]
        config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": True}
    if head.design.version == 1:
        config["architectures"] = ["LlamaForCausalLMEagle"]
        if not head.design.fc_bias:
            tensors = load_file(weights)
            tensors["fc.bias"] = tensors["fc.weight"].new_zeros(len(tensors["fc.weight"]))
            save_file(tensors, weights, metadata={"format": "pt"})
            config["bias"] = True
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _made(kind: Kind, head: Any, title: str, target: str, serve: str | None) -> Made:
    what = f"{TITLES[kind]} for speculative decoding with `{shown(target)}`: {_sizes(kind, head)}."
    lines = [
        "## How to use it",
        "These lines show how an engine takes the head; they are no statement about its speed there.",
        "Draftsmith:",
        f'```sh\ndraftsmith generate --target {shown(target)} --drafters {kind}:{title} --prompt "Hello"\n```',
    ]
    if serve:  # without a path that means nothing on another machine
        lines += [f"{'vLLM' if serve.startswith('vllm') else 'SGLang'}:", f"```sh\n{serve}\n```"]
    return Made(what, "\n\n".join(lines), library="draftsmith", tag=kind)


def _sizes(kind: Kind, head: Any) -> str:
    """What the head is, in a few words."""
    if kind != "eagle":
        blocks = f"{head.num_layers} block" + ("s" if head.num_layers > 1 else "")
        prefix = ", behind a prefix layer (Hydra++)" if getattr(head, "prefix", None) is not None else ""
        return f"{len(head.heads)} heads of {blocks} each{prefix}"
    design = head.design
    names = ("norm_before_residual", "norm_output", "norm_before_fc", "fc_norm")
    switches = [name for name in names if getattr(design, name)]
    drafted = head.config.vocab_size if head.ids_V is None else len(head.ids_V)
    parts = [f"version {design.version}", f"reads {', '.join(design.features)} of the target's states"]
    parts += [f"drafts {drafted} of {head.config.vocab_size} tokens"] if drafted < head.config.vocab_size else []
    return ", ".join(parts + [f"with {', '.join(switches)}"] * bool(switches))
