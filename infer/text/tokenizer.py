"""Tokenizers: loading them, fingerprints of what they do, and text to ids as an engine encodes it."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.infer.files.errors import first_line
from draftsmith.infer.text.read_files import hub_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
# Two tokenizers with one vocabulary that agree on these texts split text by the same rules.
PROBES = (
    "The quick brown fox's 12345.67  jumps\n\n\tover the lazy dog!?",
    "def f(x):\n    return {'a': x**2}  # déjà vu, Straße",
    " leading and trailing \r\n Москва 東京 안녕 🙂",
)


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, or of a Hub name `owner/name`; missing paths are never tried as Hub names."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not any((path / name).is_file() for name in TOKENIZER_FILES):
            raise ValueError(f"folder {name_or_path} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)})")
    elif path.exists():
        raise ValueError(f"{name_or_path} is a file: name the folder that holds the tokenizer")
    elif (match := hub_name(str(name_or_path))) is None or match["split"]:
        raise ValueError(f"{name_or_path}: no such folder (a tokenizer on the Hub is written owner/name)")
    from transformers import AutoTokenizer

    local = path.is_dir()
    try:
        return AutoTokenizer.from_pretrained(str(path if local else name_or_path), local_files_only=local)
    except Exception as error:  # transformers raises nearly anything here
        raise ValueError(f"{name_or_path}: the tokenizer cannot be loaded: {first_line(error)}") from error


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers that map the same text to the same ids, whatever size a model's vocabulary is padded to."""
    vocab = sorted((int(token_id), token) for token, token_id in tokenizer.get_vocab().items())
    added = sorted((int(i), str(token)) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items())
    probes = [_ids(tokenizer, probe) for probe in PROBES]
    return hashlib.sha256(json.dumps([vocab, added, probes]).encode()).hexdigest()


class Encoder:
    """Text to ids. `add_special_tokens` adds what the tokenizer puts before a text (BOS), once, and never what it puts
    after it: these are prompts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool) -> None:
        self.tokenizer = tokenizer
        self.prefix = self._prefix() if add_special_tokens else []

    def encode(self, text: str) -> list[int]:
        ids = _ids(self.tokenizer, text)
        return ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids

    def continuation(self, prompt: list[int], text: str) -> list[int]:
        """The ids of `text` after `prompt`. Some tokenizers begin a text with a space, so `text` is also encoded
        after a line break, and the version that decodes to `text` is taken."""
        tries = [_ids(self.tokenizer, text)]
        anchor, anchored = _ids(self.tokenizer, "\n"), _ids(self.tokenizer, "\n" + text)
        if anchored[: len(anchor)] == anchor:
            tries.append(anchored[len(anchor) :])
        start = self._decode(prompt)
        return next((ids for ids in tries if self._decode(prompt + ids) == start + text), tries[0])

    def through_special(self, text: str) -> str:
        """`text` up to and including its first special token, where the model stops; all of it if there is none."""
        found = [(text.index(token), -len(token)) for token in self.special if token in text]
        if not found:
            return text
        start, minus_length = min(found)
        return text[: start - minus_length]

    def without_end(self, text: str) -> str:
        """`text` without a special token at its end."""
        end = next((token for token in self.special if text.endswith(token)), "")
        return text.removesuffix(end)

    @cached_property
    def special(self) -> set[str]:
        """The special tokens, as text."""
        added: dict[int, Any] = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {*self.tokenizer.all_special_tokens, *(str(token) for token in added.values() if token.special)}

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _prefix(self) -> list[int]:
        with_special = [int(token) for token in self.tokenizer("a")["input_ids"]]
        bare = _ids(self.tokenizer, "a")
        starts = range(len(with_special) - len(bare) + 1)
        return next((with_special[:i] for i in starts if with_special[i : i + len(bare)] == bare), [])


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
