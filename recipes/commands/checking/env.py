"""`draftsmith env`: installed versions and hardware, to paste into a bug report."""

from __future__ import annotations

import json as json_text
from typing import Any

from draftsmith.infer.files.provenance import extras, hardware, revision, versions


def env(json: bool = False) -> None:
    """Show installed versions and this machine's hardware.

    Example: draftsmith env --json

    Args:
        json: print one JSON object instead of lines.
    """
    facts = {"versions": versions(), "extras": extras(), "git": revision(), "hardware": hardware()}
    print(json_text.dumps(facts) if json else "\n".join(_lines(facts)))


def _lines(facts: dict[str, Any]) -> list[str]:
    """One line per fact: its name, then its value."""
    rows = list(facts["versions"].items())
    if facts["git"]:
        rows.append(("revision", facts["git"]["sha"] + (" with local changes" if facts["git"]["dirty"] else "")))
    for extra, packages in facts["extras"].items():
        present = ", ".join(f"{name} {version or 'absent'}" for name, version in packages.items())
        rows.append((f"[{extra}]", present))
    return [f"{name:<16} {value}" for name, value in rows + _machine(facts["hardware"])]


def _machine(hardware: dict[str, Any]) -> list[tuple[str, str]]:
    cpu = hardware["cpu"]
    cuda = hardware["torch_cuda"] or (f"HIP {hardware['torch_hip']}" if hardware["torch_hip"] else "none in this build")
    rows = [
        ("CUDA", cuda),
        ("CPU", f"{cpu['model']} ({cpu['machine']})"),
        ("cores", f"{cpu['cores']}, {cpu['cores_usable']} usable, {cpu['torch_threads']} torch threads"),
        ("CPU features", ", ".join(cpu["flags"]) or "none known"),
        ("memory", f"{hardware['memory_gib']} GiB" if hardware["memory_gib"] else "unknown"),
    ]
    for index, gpu in enumerate(hardware["gpus"]):
        bf16 = "bf16" if gpu["bf16"] else "no bf16"
        rows.append((f"GPU {index}", f"{gpu['name']}, {gpu['memory_gib']} GiB, capability {gpu['capability']}, {bf16}"))
    return rows if hardware["gpus"] else [*rows, ("GPU", "none that torch can use")]
