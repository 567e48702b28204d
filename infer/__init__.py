"""Targets, drafters, verification and the engine that decodes. Each name below is imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from draftsmith.infer.contract.draft import Draft
    from draftsmith.infer.contract.row import Row, Stops
    from draftsmith.infer.contract.sampling import Settings
    from draftsmith.infer.contract.trace import Generation
    from draftsmith.infer.drafters.registry import load_drafter
    from draftsmith.infer.engine.engine import Engine
    from draftsmith.infer.engine.speculative import speculative
    from draftsmith.infer.models.hf_target import HFTarget
    from draftsmith.infer.models.load import load_target

__all__ = [
    "Draft", "Engine", "Generation", "HFTarget", "Row", "Settings", "Stops", "load_drafter", "load_target",
    "speculative",
]  # fmt: skip

_MODULES = {
    "Draft": "contract.draft",
    "Engine": "engine.engine",
    "Generation": "contract.trace",
    "HFTarget": "models.hf_target",
    "Row": "contract.row",
    "Settings": "contract.sampling",
    "Stops": "contract.row",
    "load_drafter": "drafters.registry",
    "load_target": "models.load",
    "speculative": "engine.speculative",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
