"""The facts that go into run.json, and that `draftsmith env` prints.

Versions, hardware, source revision, date, and the command with its configuration. Left out on purpose: the names of
host and user, and anything that grants access. The home folder is written as `~`.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "draftsmith", "torch", "transformers", "tokenizers", "numpy", "pyarrow", "lightning", "datasets", "peft",
    "deepspeed", "faiss-cpu",
)  # fmt: skip
HIDDEN = "***"

# CPU features that matter to a forward pass, by their Linux names.
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "bf16", "sve")
_SECRET_NAME = re.compile(
    r"(^|[_-])(api[_-]?key|access[_-]?key|password|passwd|secret|credentials?"
    r"|(hf|hub|auth|access|api|bearer|github)[_-]?token)$|^token$",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_SECRET_TEXT = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,})")
_URL_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")


def provenance(command: list[str], config: Mapping[str, Any], seed: int | None = None) -> dict[str, Any]:
    """What run.json records about a run, ready for `json.dumps`."""
    words = [Path(command[0]).name, *command[1:]] if command else []
    return {
        "command": _command_without_secrets(words),
        "config": without_secrets(config),
        "seed": seed,
        "git": revision(),
        "versions": versions(),
        "hardware": hardware(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The versions of Python, the system, and those of `packages` that are installed."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"}
    return found | {package: version for package in packages if (version := installed(package)) is not None}


def installed(package: str) -> str | None:
    """The version of a distribution; None if it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def extras() -> dict[str, dict[str, str | None]]:
    """Extra -> distribution -> version (None if absent), from the package's own metadata."""
    found: dict[str, dict[str, str | None]] = {}
    for requirement in metadata.requires("draftsmith") or []:
        matched = re.match(r"([A-Za-z0-9._-]+).*;.*extra == ['\"]([\w-]+)['\"]", requirement)
        if matched:
            package, extra = matched.groups()
            found.setdefault(extra, {})[package] = installed(package)
    return found


def revision(folder: Path | None = None) -> dict[str, Any] | None:
    """The git revision of this source; None if the package does not run from its own checkout."""
    folder = folder or Path(__file__).resolve().parent
    # An installed copy may be inside another project's checkout: check that git tracks this file.
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    sha = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"sha": sha, "dirty": bool(changes)} if sha else None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def hardware() -> dict[str, Any]:
    """CPU, memory and GPUs."""
    import torch

    model, flags = _cpu_facts()
    return {
        "cpu": {
            "model": model,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "cores_usable": _cores_usable(),
            "torch_threads": torch.get_num_threads(),
            "flags": [flag for flag in _CPU_FLAGS if flag in flags],
        },
        "memory_gib": _memory_gib(),
        "gpus": _gpus(),
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
    }


def _cores_usable() -> int | None:
    """The cores that this process may use; in a container or under taskset fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu_facts() -> tuple[str, set[str]]:
    """Model name and feature flags of the first CPU; without /proc/cpuinfo no flags."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name") or platform.machine(), flags


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        capability = f"{facts.major}.{facts.minor}"
        bf16 = facts.major >= 8 or torch.version.hip is not None
        memory = round(facts.total_memory / 2**30, 1)
        found.append({"name": facts.name, "memory_gib": memory, "capability": capability, "bf16": bf16})
    return found


def without_secrets(value: Any, name: str = "") -> Any:
    """`value` in plain types, with home folders as `~` and everything that grants access as ***."""
    if isinstance(value, Mapping):
        return {str(key): without_secrets(entry, str(key)) for key, entry in value.items()}
    if value not in (None, "") and _SECRET_NAME.search(name):
        return HIDDEN
    if isinstance(value, list | tuple | set | frozenset):
        return [without_secrets(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return _clean_text(str(value))


def _command_without_secrets(words: list[str]) -> list[str]:
    """The same for a command line: hides the X of `--hub_token X` and `--hub_token=X`."""
    cleaned: list[str] = []
    previous = ""
    for word in words:
        flag, equals, value = word.partition("=")
        if equals and flag.startswith("--"):
            cleaned.append(f"{flag}={without_secrets(value, _last_part(flag))}")
        else:
            cleaned.append(str(without_secrets(word, _last_part(previous))))
        previous = word if word.startswith("--") else ""
    return cleaned


def _last_part(flag: str) -> str:
    return flag.lstrip("-").rpartition(".")[2]


def _clean_text(text: str) -> str:
    for variable, secret in os.environ.items():
        if len(secret) >= 8 and _SECRET_VARIABLE.search(variable):
            text = text.replace(secret, HIDDEN)
    text = _SECRET_TEXT.sub(HIDDEN, text)
    text = _URL_LOGIN.sub(f"{HIDDEN}@", text)
    home = os.path.expanduser("~").rstrip("/")
    return re.sub(rf"(?<![\w./-]){re.escape(home)}(?=/|$|[\s,:\]])", "~", text) if home else text
