"""The folder of a trained draft: a plain Hugging Face model whose config names its exits and its template."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def save_model(
    folder: Path,
    model: Any,
    tokenizer: Any,
    *,
    exits: Sequence[int],
    template_fingerprint: str = "",
) -> None:
    """Write weights, config and tokenizer beside their place, then move them in, config.json last."""
    part = folder / f".model.{os.getpid()}.part"
    try:
        part.mkdir(parents=True)
        config = model.config
        if len(exits) > 1:
            config.sorted_exits = list(exits)
        elif hasattr(config, "sorted_exits"):
            del config.sorted_exits
        if template_fingerprint:
            config.template_fingerprint = template_fingerprint
        config.dtype = next(model.parameters()).dtype
        model.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        for path in sorted(part.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)
    except OSError as error:
        raise ValueError(f"{folder}: the model could not be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
