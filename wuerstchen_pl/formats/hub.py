"""Uploads to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi


def upload(
    folder: Path, repo_id: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Upload a folder to a model repository, which is created if needed; returns its URL.

    Args:
        folder: the files.
        repo_id: ``user/name``.
        private: whether a new repository is private; None is the account's default.
        token: a token with write access; None is that of ``hf auth login``.
    """
    api = HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=str(folder))
    return str(url)
