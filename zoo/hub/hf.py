"""Hugging Face hub: fetching through huggingface_hub's own client and cache, and uploading a folder."""

from __future__ import annotations

import os
from pathlib import Path

from zoo.errors import HubError, OfflineError
from zoo.hub.sources import Source

DEFAULT_ENDPOINT = "https://huggingface.co"
_TRUE = frozenset({"1", "on", "yes", "true"})


def is_offline(offline: bool | None = None) -> bool:
    """Whether the network must not be used: `offline` if given, else ZOO_OFFLINE or HF_HUB_OFFLINE."""
    if offline is not None:
        return offline
    return any(os.environ.get(name, "").lower() in _TRUE for name in ("ZOO_OFFLINE", "HF_HUB_OFFLINE"))


def hub_endpoint() -> str:
    """The hub (or mirror) in use now; huggingface_hub itself would freeze HF_ENDPOINT when it is imported."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or DEFAULT_ENDPOINT


def fetch_hub(source: Source, *, cache_dir: Path | None, offline: bool) -> Path:
    """Return the cached file, or the snapshot folder when `source.file` is None.

    Raises OfflineError (nothing cached and no network) or HubError (no such repository, revision or file; denied).
    """
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    endpoint = hub_endpoint()
    try:
        if source.file is not None:
            found = hf_hub_download(
                source.location,
                source.file,
                revision=source.revision,
                cache_dir=cache,
                endpoint=endpoint,
                local_files_only=offline,
            )
            return Path(found)
        folder = Path(
            snapshot_download(
                source.location,
                revision=source.revision,
                cache_dir=cache,
                endpoint=endpoint,
                local_files_only=offline,
            )
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise _offline(source, cache, endpoint, offline, error) from error
    except Exception as error:
        # The client raises OSError, ValueError, its HTTP library's own family and RuntimeError from its Rust part.
        raise HubError(f"could not fetch {str(source)!r} from {endpoint}: {_first_lines(error)}") from error
    _check_whole(source, folder, cache, endpoint, offline)
    return folder


def _check_whole(source: Source, folder: Path, cache: Path, endpoint: str, offline: bool) -> None:
    """Refuse a snapshot folder that holds only files fetched one by one.

    Without the network the client returns such a folder as if it were the repository; only the file list it stores
    with a real snapshot shows that everything is there.
    """
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        get_cached_repo_tree(source.location, revision=folder.name, cache_dir=cache)
    except CachedRepoTreeNotFoundError as error:
        raise _offline(source, cache, endpoint, offline, error) from error


def _offline(source: Source, cache: Path, endpoint: str, offline: bool, error: Exception) -> OfflineError:
    repo_folder = cache / ("models--" + source.location.replace("/", "--"))
    what = f"{source.location} {source.file}" if source.file else source.location
    revision = f" --revision {source.revision}" if source.revision else ""
    reason = "offline mode is on" if offline else f"{endpoint} could not be reached ({_first_lines(error)})"
    return OfflineError(
        f"{str(source)!r} is not {'' if source.file else 'completely '}in the local cache and {reason}. "
        f"On a connected machine run: hf download {what}{revision} (it comes from {endpoint}/{source.location}), "
        f"then copy its cache folder models--{source.location.replace('/', '--')} to {repo_folder}"
    )


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
) -> str:
    """Upload every file of `folder` to the model repository `repo_id` in one commit and return the commit's URL.

    The repository, and the branch `revision`, are created if absent; `private=None` takes the account's default and
    an existing repository keeps its visibility. Raises OfflineError, or HubError (no folder, no token, refused).
    """
    path = Path(folder).expanduser()
    if not path.is_dir() or not any(path.iterdir()):
        raise HubError(f"{path} is not a folder with files; nothing to upload to {repo_id!r}")
    endpoint = hub_endpoint()
    if is_offline():
        raise OfflineError(
            f"offline mode is on (ZOO_OFFLINE or HF_HUB_OFFLINE), so {path} was not uploaded to {endpoint}/{repo_id}; "
            f"later run: hf upload {repo_id} {path}"
        )
    from huggingface_hub import HfApi, get_token

    token = token or get_token()
    if not token:
        raise HubError(
            f"uploading to {endpoint}/{repo_id} needs a token with write access: "
            "pass token=..., set HF_TOKEN, or run hf auth login"
        )
    api = HfApi(endpoint=endpoint, token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=path, revision=revision, commit_message=commit_message)
    except Exception as error:  # the same mixed families as in fetch_hub
        raise HubError(f"could not upload {path} to {endpoint}/{repo_id}: {_first_lines(error)}") from error
    return str(commit.commit_url)


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"
