"""Whose passes a costs file holds: the target and the machine. Costs of another target or machine are refused.

The cost of a pass depends on a model's shape, so a target is identified by its config; where weights were loaded, by
their fingerprint as well. `plan` has random weights and records the config alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.infer.contract.protocols import Sharded

if TYPE_CHECKING:
    import torch

    from draftsmith.infer.contract.protocols import Target

# Entries of a config that do not change the model: where it came from, and how it was saved.
NOT_SHAPE = {
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "model_type",
}
# What two machines must share for the costs of one to hold on the other.
MACHINE_KEYS = ("device", "name", "threads", "dtype", "ranks")
# A model's vocabulary may be padded beyond its tokenizer's by this share and number of ids.
PADDING = (0.05, 256)


@dataclass(frozen=True, slots=True)
class TargetIdentity:
    """`config`: hash of the config; `fingerprint`: of the weights, "" for random ones; `tokenizer`: its fingerprint,
    "" if there is none."""

    name: str
    config: str
    parameters: int
    vocab_size: int
    fingerprint: str = ""
    tokenizer: str = ""

    @classmethod
    def of(cls, name: str, target: Target, tokenizer: str = "") -> TargetIdentity:
        """A loaded target, under the name that it was loaded by."""
        assert target.model is not None
        if isinstance(target, Sharded):
            parameters = target.parameters
        else:
            parameters = sum(parameter.numel() for parameter in target.model.parameters())
        digest = config_hash(target.model.config)
        return cls(short_name(name), digest, parameters, target.vocab_size, target.fingerprint(), tokenizer)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TargetIdentity:
        return cls(**value)

    def is_same(self, other: TargetIdentity) -> bool:
        """By fingerprint where both have one, else by config and number of parameters."""
        if self.fingerprint and other.fingerprint:
            return self.fingerprint == other.fingerprint
        return (self.config, self.parameters) == (other.config, other.parameters)

    def fits_tokenizer(self, fingerprint: str, size: int) -> bool:
        """Whether this target decodes ids of a tokenizer with this fingerprint and number of ids."""
        if self.tokenizer:
            return self.tokenizer == fingerprint
        return size <= self.vocab_size <= size * (1 + PADDING[0]) + PADDING[1]


def short_name(name: str) -> str:
    """The last part of a path, a Hub name unchanged."""
    path = Path(name).expanduser()
    if path.name == "config.json":
        path = path.resolve().parent
    return path.resolve().name if path.exists() or path.is_absolute() else name


def config_hash(config: Any) -> str:
    facts = {key: value for key, value in config.to_dict().items() if key not in NOT_SHAPE}
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def machine(device: torch.device, dtype: torch.dtype, ranks: int = 1) -> dict[str, Any]:
    """The machine that costs were measured on; they do not hold for another. `ranks`: those that the target is split
    over."""
    import torch

    from draftsmith.infer.files.provenance import hardware

    facts = hardware()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else facts["cpu"]["model"]
    return {
        "device": device.type,
        "name": name,
        "cores": facts["cpu"]["cores_usable"],
        "threads": facts["cpu"]["torch_threads"],
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
    } | ({"ranks": ranks} if ranks > 1 else {})


def same_machine(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether costs of one machine hold on the other; the CPU's threads do not matter to a GPU. Modelled costs hold on
    none."""
    if one.get("modelled") or other.get("modelled"):
        return False
    keys = [key for key in MACHINE_KEYS if key != "threads" or one.get("device") == "cpu"]
    return all(one.get(key) == other.get(key) for key in keys)


def machine_text(facts: Mapping[str, Any]) -> str:
    """As in `AMD EPYC 9B14, 2 threads, bfloat16`."""
    threads = f", {facts['threads']} threads" if facts.get("device") == "cpu" else ""
    text = f"{facts.get('name') or 'an unnamed machine'}{threads}, {facts.get('dtype', 'unknown dtype')}"
    text += f", {facts['ranks']} ranks" if facts.get("ranks") else ""
    return f"{text} ({modelled_on(facts)})" if facts.get("modelled") else text


def modelled_on(facts: Mapping[str, Any]) -> str:
    """As in `modelled on an H100`; "" for a machine that was measured."""
    return f"modelled on {facts['article']}" if facts.get("modelled") else ""
