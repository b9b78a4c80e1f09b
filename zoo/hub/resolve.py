"""From a weights source to a local, verified path."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from zoo.errors import HubError, OfflineError, OptionError, UnknownNameError, nearest
from zoo.hub.download import download, file_sha256
from zoo.hub.hf import fetch_hub, is_offline
from zoo.hub.packaged import find_packaged, packaged_weights
from zoo.hub.sources import FORMS, Scheme, Source

_SHA256 = re.compile(r"[0-9a-f]{64}")
# timm's and open_clip's release files carry the first eight digits of their sha256: name-1234abcd.pth
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8})\.[a-z]+$")
_TIMM_FILES = ("model.safetensors", "pytorch_model.bin")
_OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def fetch(
    source: str | Source,
    *,
    sha256: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
) -> Path:
    """Return a local path for `source`: a file, or a folder for a local folder or a hub repository without `:file`.

    sha256: 64 hex digits the file must have. Packages listed in `zoo.hub.packaged.PACKAGED` are always checked.
    cache_dir: where downloads are kept; by default $ZOO_CACHE or ~/.cache/zoo for URLs, and huggingface_hub's cache.
    offline: True never uses the network, False always may; None asks ZOO_OFFLINE and HF_HUB_OFFLINE.

    Raises OfflineError (not cached, no network), HubError (missing, refused, wrong hash), UnknownNameError (unknown
    scheme, model or tag), OptionError (`sha256` malformed or given for a folder).
    """
    if isinstance(source, str):
        source = Source.parse(source)
    if sha256 is not None:
        sha256 = sha256.lower()
        if not _SHA256.fullmatch(sha256):
            raise OptionError(f"sha256 must be 64 hex digits, got {sha256!r}")
    cache = Path(cache_dir).expanduser() if cache_dir is not None else None
    no_network = is_offline(offline)
    if source.scheme is Scheme.FILE:
        return _verified(_local(source), source, sha256)
    if source.scheme is Scheme.PIP:
        entry = packaged_weights(source)
        path = _verified(find_packaged(source), source, entry.sha256 if entry else None)
        return _verified(path, source, sha256)
    if source.scheme in (Scheme.HTTPS, Scheme.HTTP):
        return _fetch_url(source.location, cache, no_network, sha256)
    if source.scheme is Scheme.HF_HUB:
        return _verified(fetch_hub(source, cache_dir=cache, offline=no_network), source, sha256)
    places = _timm_places(source) if source.scheme is Scheme.TIMM else _open_clip_places(source)
    return _fetch_first(source, places, cache, no_network, sha256)


def cached_path(url: str, cache_dir: Path | None = None) -> Path:
    """Where the file of `url` is kept; the whole URL decides, so equal names of different versions never meet."""
    cache = cache_dir or Path(os.environ.get("ZOO_CACHE") or "~/.cache/zoo").expanduser()
    parts = urlsplit(url)
    name = re.sub(r"[^\w.-]", "_", PurePosixPath(parts.path).name) or "file"
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    return cache / "url" / (parts.hostname or "").replace(":", "_") / key / name[-120:]


def _fetch_url(url: str, cache: Path | None, offline: bool, sha256: str | None) -> Path:
    target = cached_path(url, cache)
    mismatch = ""
    if target.is_file():
        found = file_sha256(target) if sha256 else ""
        if sha256 is None or found.startswith(sha256):
            return target
        mismatch = f" (the copy there has sha256 {found}, expected {sha256})"
    if offline:
        raise OfflineError(
            f"{url} is not in the local cache{mismatch} and offline mode is on. "
            f"Fetch it on a connected machine and put it at {target}"
        )
    return download(url, target, sha256=sha256)


def _local(source: Source) -> Path:
    path = Path(source.location).expanduser()
    if not path.exists():
        raise HubError(
            f"weights source {str(source)!r}: no file or folder {path} (seen from {Path.cwd()}); "
            f"other sources are written {', '.join(FORMS.values())}"
        )
    return path


def _verified(path: Path, source: Source, sha256: str | None) -> Path:
    """Return `path` if its hash fits. The file is never deleted: a person, a package or the hub's cache owns it."""
    if sha256 is None:
        return path
    if path.is_dir():
        raise OptionError(f"sha256 is for one file, but {str(source)!r} is the folder {path}; name a file in it")
    found = file_sha256(path)
    if found != sha256:
        raise HubError(
            f"{str(source)!r} at {path} has sha256 {found}, expected {sha256}; "
            "it is another version or damaged, and was left as it is"
        )
    return path


def _fetch_first(source: Source, places: list[Source], cache: Path | None, offline: bool, sha256: str | None) -> Path:
    """Fetch the first place that has the file; only "this file is not there" moves on to the next."""
    from huggingface_hub.errors import EntryNotFoundError

    problem: HubError | None = None
    for place in places:
        try:
            if place.scheme is Scheme.HF_HUB:
                return _verified(fetch_hub(place, cache_dir=cache, offline=offline), source, sha256)
            return _fetch_url(place.location, cache, offline, sha256 or _hash_of(place.location))
        except HubError as error:
            # Offline, a missing file cannot be told from an uncached one: look at every name, report the first.
            if not isinstance(error.__cause__, EntryNotFoundError):
                raise
            problem = problem or error
    assert problem is not None  # places is never empty
    raise problem


def _hash_of(url: str) -> str | None:
    """The digest a release URL itself carries: a whole one as a folder, or eight digits in the file name."""
    parts = urlsplit(url).path.split("/")
    whole = next((part for part in parts if _SHA256.fullmatch(part)), None)
    short = _HASH_IN_NAME.search(parts[-1])
    return whole or (short.group(1) if short else None)


def _timm_places(source: Source) -> list[Source]:
    """Where timm itself would look: the hub repository of the pretrained tag first, else its URL."""
    import timm

    name = f"{source.location}.{source.revision}" if source.revision else source.location
    tagged = timm.list_pretrained()
    if not timm.is_model(source.location):
        raise UnknownNameError(f"timm has no model {source.location!r}; {nearest(source.location, timm.list_models())}")
    if source.revision and name not in tagged:
        own = [each.partition(".")[2] for each in tagged if each.partition(".")[0] == source.location]
        raise UnknownNameError(
            f"timm model {source.location!r} has no weights {source.revision!r}; {nearest(source.revision, own)}"
        )
    cfg = timm.get_pretrained_cfg(name)
    if cfg is not None and cfg.hf_hub_id:
        files = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else _TIMM_FILES
        return [Source.parse(f"hf-hub:{cfg.hf_hub_id}:{file}") for file in files]
    if cfg is not None and isinstance(cfg.url, str) and cfg.url:
        return [Source.parse(cfg.url)]
    raise HubError(f"timm model {name!r} has no pretrained weights to fetch")


def _open_clip_places(source: Source) -> list[Source]:
    """Where open_clip itself would look: its hub repository (`org/name/` or `org/name/file`) first, else its URL."""
    import open_clip  # type: ignore[import-untyped,unused-ignore]

    tag = source.revision or ""
    if source.location not in open_clip.list_models():
        hint = nearest(source.location, open_clip.list_models())
        raise UnknownNameError(f"open_clip has no model {source.location!r}; {hint}")
    cfg = open_clip.get_pretrained_cfg(source.location, tag)
    if not cfg:
        hint = nearest(tag, open_clip.list_pretrained_tags_by_model(source.location))
        raise UnknownNameError(f"open_clip model {source.location!r} has no weights {tag!r}; {hint}")
    if cfg.get("hf_hub"):
        repo, _, file = cfg["hf_hub"].rpartition("/")
        return [Source(Scheme.HF_HUB, repo, file=each) for each in ((file,) if file else _OPEN_CLIP_FILES)]
    return [Source.parse(cfg["url"])]
