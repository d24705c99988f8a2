"""``export --push``: an exported folder becomes a repository of the Hugging Face Hub, or its next commit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def check_push(repository: str, environment: Mapping[str, str]) -> None:
    """Check what a push needs before anything is exported.

    Raises:
        ValueError: the name is none, there is no token, or the package is missing.
    """
    if not REPOSITORY.fullmatch(repository):
        raise ValueError(f"--push {repository} must be OWNER/NAME, such as me/policy")
    if not environment.get("HF_TOKEN", "").strip():
        raise ValueError(
            "--push needs HF_TOKEN in .env, a token that may write: huggingface.co -> Settings -> Access Tokens"
        )
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise ValueError("--push needs: .venv/bin/pip install huggingface_hub") from error


def push(folder: Path, repository: str, is_public: bool, environment: Mapping[str, str]) -> str:
    """Upload an exported folder as one commit; a repository that is not there is made.

    Args:
        folder: complete and checked.
        repository: OWNER/NAME.
        is_public: of a new repository; one that exists stays as it is.
        environment: has the token; ``HF_ENDPOINT`` is another hub than huggingface.co.

    Returns:
        The address of the commit.

    Raises:
        ValueError: it was refused, or the hub cannot be reached; the token is in no message.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    hub = HfApi(token=environment["HF_TOKEN"].strip(), library_name="continuous-training")
    try:
        hub.create_repo(repository, private=not is_public, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"Export {folder.name}"
        )
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "nothing"
        refused = "; HF_TOKEN in .env must be a token that may write there" if status in (401, 403) else ""
        raise ValueError(
            f"--push {repository}: the hub answers HTTP {status}{refused}; {_kept(folder)}"
        ) from None
    except Exception as error:  # noqa: BLE001 - the library's words may hold the token: only the kind is shown
        kind = type(error).__name__
        raise ValueError(
            f"--push {repository}: the hub cannot be reached ({kind}); {_kept(folder)}"
        ) from None
    return str(commit.commit_url)


def _kept(folder: Path) -> str:
    return f"the export is in {folder}"
