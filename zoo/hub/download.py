"""Plain https downloads: resumed, size-limited, verified before they land.

The clients at hand do not fit: `torch.hub.download_url_to_file` cannot resume, and huggingface_hub's `http_get`
resumes only inside one call, has no size limit and does not notice that a file changed between two requests.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.message import Message
from pathlib import Path
from typing import IO

from filelock import FileLock

from zoo.errors import HubError, OfflineError
from zoo.hub.sources import check_url

MAX_BYTES = 64 * 2**30
TIMEOUT_SECONDS = 30.0  # of silence, not of the whole transfer
ATTEMPTS = 5  # in a row without a single new byte
PAUSE_SECONDS = 0.5
_CHUNK = 2**20
_TRY_AGAIN = frozenset({408, 429, 500, 502, 503, 504})


class _Interrupted(Exception):
    """The transfer stopped early; what is in the part file stays useful."""


class _Unreachable(_Interrupted):
    """No connection came about at all."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects keep the rule of the first URL: never from https down to plain http, ftp or file."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as 64 hex digits, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def download(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    max_bytes: int = MAX_BYTES,
    timeout: float = TIMEOUT_SECONDS,
    pause: float = PAUSE_SECONDS,
) -> Path:
    """Fetch `url` into `target` and return it.

    Bytes gather in `<target>.part`, which a later call (or process) continues with a Range request; `target` is
    replaced in one step and only after the hash fits, so an earlier good file survives every failure.

    sha256: the expected digest, or its first digits where a publisher gives only those.
    Raises OfflineError (no connection) or HubError: transfer failed, too large, or wrong hash (both hashes are named
    and the part file is removed).
    """
    check_url(url)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):  # two processes must not append to one part file
            part = target.with_name(target.name + ".part")
            _gather(url, part, max_bytes=max_bytes, timeout=timeout, pause=pause, hash_known=sha256 is not None)
            _check_hash(url, part, sha256)
            os.replace(part, target)
            _tag_file(part).unlink(missing_ok=True)
    except OSError as error:
        if isinstance(error, HubError):
            raise
        raise HubError(f"could not store {url} as {target}: {error}") from error
    return target


def _gather(url: str, part: Path, *, max_bytes: int, timeout: float, pause: float, hash_known: bool) -> None:
    """Request again and again, each time from where the part file ends, while progress is made."""
    idle = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _request(url, part, max_bytes=max_bytes, timeout=timeout, hash_known=hash_known)
            return
        except _Interrupted as error:
            after = part.stat().st_size if part.exists() else 0
            idle = 0 if after > before else idle + 1
            if idle >= ATTEMPTS and not after and isinstance(error, _Unreachable):
                raise OfflineError(
                    f"{url} could not be reached: {error}. Fetch it on a connected machine and put it at "
                    f"{part.with_suffix('')}"
                ) from error
            if idle >= ATTEMPTS:
                raise HubError(
                    f"download of {url} stopped after {after} bytes: {error} ({ATTEMPTS} attempts without a new byte). "
                    f"Calling again continues from {part}"
                ) from error
            time.sleep(pause)


def _request(url: str, part: Path, *, max_bytes: int, timeout: float, hash_known: bool) -> None:
    """One request. Returns when the file is whole; raises _Interrupted if another request may help."""
    start, tag = _resume_point(part, hash_known)
    headers = {"Accept-Encoding": "identity", "User-Agent": "vision-adapter-zoo"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if tag:
            headers["If-Range"] = tag  # a changed file answers 200 and is read from its beginning
    opener = urllib.request.build_opener(_Redirects())
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=timeout) as response:
            resumed = response.status == 206
            if resumed and _range_start(response.headers) != start:
                raise HubError(f"{url}: asked for bytes from {start}, got {response.headers.get('Content-Range')!r}")
            _store(url, response, part, start if resumed else 0, max_bytes)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{start}":
            return  # an earlier run fetched the last byte but ended before it could move the file
        _refused(url, error, part, start)
    except HubError:
        raise
    except urllib.error.URLError as error:
        raise _Unreachable(str(error.reason)) from error
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise _Interrupted(str(error) or type(error).__name__) from error


def _refused(url: str, error: urllib.error.HTTPError, part: Path, start: int) -> None:
    """Raise for an HTTP error status: _Interrupted where another request may help, else HubError."""
    if error.code == 416 and start:
        # The part file is as long as the remote file or longer: it belongs to another version of it.
        _discard(part)
        raise _Interrupted("the partial file no longer matches the server's") from error
    if error.code in _TRY_AGAIN:
        raise _Interrupted(f"HTTP {error.code} {error.reason}") from error
    raise HubError(f"{url} answered HTTP {error.code} {error.reason}") from error


def _store(url: str, response: http.client.HTTPResponse, part: Path, start: int, max_bytes: int) -> None:
    """Append the body to the part file (or begin it anew when `start` is 0) and check that it is whole."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise HubError(f"{url} was sent with Content-Encoding {encoding!r} although plain bytes were asked for")
    length = response.headers.get("Content-Length")
    total = start + int(length) if length and length.isdigit() else None
    if total is not None and total > max_bytes:
        raise HubError(f"{url} is {total} bytes, more than the limit of {max_bytes}")
    if not start:
        _write_tag(part, response.headers)
    size = start
    with part.open("ab" if start else "wb") as file:
        while block := response.read(_CHUNK):
            size += len(block)
            if size > max_bytes:
                file.close()
                _discard(part)
                raise HubError(f"{url} is longer than the limit of {max_bytes} bytes")
            file.write(block)
    if total is not None and size != total:
        raise _Interrupted(f"connection closed at byte {size} of {total}")


def _check_hash(url: str, part: Path, sha256: str | None) -> None:
    if sha256 is None:
        return
    found = file_sha256(part)
    if not found.startswith(sha256):
        _discard(part)
        raise HubError(f"{url} has sha256 {found}, expected {sha256}; the download was removed")


def _resume_point(part: Path, hash_known: bool) -> tuple[int, str | None]:
    """Bytes to keep and the tag that proves the remote file is still the same one.

    Without a tag two versions could be joined unnoticed, so then only a known hash allows resuming.
    """
    if not part.exists():
        return 0, None
    tag_file = _tag_file(part)
    tag = tag_file.read_text("utf-8") if tag_file.exists() else None
    return (part.stat().st_size if tag or hash_known else 0), tag


def _write_tag(part: Path, headers: Mapping[str, str] | Message) -> None:
    etag = headers.get("ETag")
    strong = etag if etag and not etag.startswith("W/") else None  # If-Range takes no weak tags
    tag = strong or headers.get("Last-Modified")
    if tag:
        _tag_file(part).write_text(tag, "utf-8")
    else:
        _tag_file(part).unlink(missing_ok=True)


def _range_start(headers: Mapping[str, str] | Message) -> int | None:
    unit, _, rest = (headers.get("Content-Range") or "").partition(" ")
    first = rest.partition("-")[0]
    return int(first) if unit == "bytes" and first.isdigit() else None


def _tag_file(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag_file(part).unlink(missing_ok=True)
