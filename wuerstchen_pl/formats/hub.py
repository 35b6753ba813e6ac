"""Repositories of the Hugging Face hub: downloads and uploads."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

PATTERNS = ["*.json", "*.txt", "*.safetensors"]
"""Files that are downloaded; pickles are not."""


def is_hub_id(source: str) -> bool:
    """Whether a source can only be a repository of the hub, as no such path exists."""
    has_its_form = source.count("/") == 1 and not source.startswith((".", "/"))
    return has_its_form and not Path(source).exists()


def resolve_source(source: str, variant: str | None = None, revision: str | None = None) -> Path:
    """A local path unchanged, or the folder of a downloaded hub repository.

    Weights of the variant fp16 are downloaded only if ``variant`` is set, or there are no others.

    Raises:
        FileNotFoundError: if it is not a path and cannot be downloaded.
        ValueError: if ``revision`` is set for a path.
    """
    if not is_hub_id(source):
        if revision is not None:
            raise ValueError(f"revision={revision} is of a hub id, but {source} is not; remove it")
        return Path(source)
    try:
        if variant is None:
            folder = _download(source, revision, ignore=["*.fp16.*", "*.fp16-*"])
            parts = [config.parent for config in folder.rglob("config.json")]
            if all(any(part.glob("*.safetensors")) for part in parts):
                return folder
        return _download(source, revision)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{source} is not a path and could not be downloaded from the hub: {reason}"
        ) from error


def resolve_file(path: str | Path, name: str, *, key: str, use: str) -> Path:
    """A local file: the path itself, or the file ``name`` of a folder or of a hub repository.

    Args:
        path: a file, a folder or a hub id.
        name: of the file in a folder.
        key: that named the path, for messages.
        use: what to use instead of a file that does not exist.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    source = resolve_source(str(path))
    file = source / name if source.is_dir() else source
    if not file.is_file():
        raise FileNotFoundError(f"{key}={path} does not exist; use {use}")
    return file


def _download(source: str, revision: str | None, ignore: list[str] | None = None) -> Path:
    folder = snapshot_download(
        source, revision=revision, allow_patterns=PATTERNS, ignore_patterns=ignore
    )
    return Path(folder)


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
