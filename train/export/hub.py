"""A folder to the Hugging Face Hub, by huggingface_hub. Run again after a break, what is there is not sent again.

Who may write is that library's affair (its token comes from its own login or environment); no token is read, kept or
printed here.
"""

from __future__ import annotations

from pathlib import Path

from draftsmith.infer.files.locations import is_hub_name
from draftsmith.infer.files.provenance import without_secrets


def check_hub_name(name: str) -> None:
    if not is_hub_name(name):
        raise ValueError(f"{name!r} is no Hub name: write owner/model")


def upload(folder: Path, name: str, *, private: bool) -> str:
    """Create the repository where it is missing, upload `folder`, and return where it is now."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_hub_name(name)
    api = HfApi()
    try:
        url = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a draft model")
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name}: the upload did not end ({without_secrets(first)}); the model stands in {folder}, run the same "
            "command again"
        ) from error
    return str(url)
