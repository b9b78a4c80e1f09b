"""The text that names where weights come from, parsed into a value. No file or network is touched here."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from zoo.errors import HubError, UnknownNameError, nearest


class Scheme(StrEnum):
    """The kinds of weights source; the value is what stands before the colon."""

    TIMM = "timm"
    OPEN_CLIP = "open_clip"
    HF_HUB = "hf-hub"
    HTTPS = "https"
    HTTP = "http"
    FILE = "file"
    PIP = "pip"


FORMS = {
    Scheme.TIMM: "timm:name[.tag]",
    Scheme.OPEN_CLIP: "open_clip:arch/pretrained_tag",
    Scheme.HF_HUB: "hf-hub:org/name[@revision][:file]",
    Scheme.HTTPS: "https://host/path",
    Scheme.HTTP: "http://localhost/path",
    Scheme.FILE: "file:/path (or a bare path)",
    Scheme.PIP: "pip:package[/path/inside]",
}

# One letter before a colon is a Windows drive, not a scheme.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+_.-]+):(.*)", re.DOTALL)
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Source:
    """A parsed weights source; `str(source)` gives text that parses to an equal value.

    location: timm / open_clip architecture, hub repository, full URL, local path, or distribution name.
    revision: git revision (hf-hub) or pretrained tag (timm, open_clip).
    file: path inside the repository (hf-hub) or inside the package (pip).
    """

    scheme: Scheme
    location: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> Source:
        """Parse `text` (forms: `FORMS`). Raises UnknownNameError (unknown scheme) or HubError (malformed)."""
        if not text.strip() or any(ord(char) < 32 for char in text):
            raise HubError(f"a weights source must be printable text, got {text!r}; forms: {_forms()}")
        match = _SCHEME.fullmatch(text)
        if match is None or text.startswith((".", "/", "~")):
            return cls(Scheme.FILE, text)
        name, rest = match.groups()
        try:
            scheme = Scheme(name)
        except ValueError:
            hint = nearest(name, [each.value for each in Scheme])
            raise UnknownNameError(
                f"unknown scheme {name!r} in weights source {text!r}; {hint} Forms: {_forms()}. "
                f"A local path with a colon is written file:{text}"
            ) from None
        return _PARSERS[scheme](text, rest)

    def __str__(self) -> str:
        if self.scheme in (Scheme.HTTPS, Scheme.HTTP):
            return self.location
        if self.scheme is Scheme.HF_HUB:
            revision = f"@{self.revision}" if self.revision else ""
            return f"hf-hub:{self.location}{revision}" + (f":{self.file}" if self.file else "")
        tail = {Scheme.TIMM: ".", Scheme.OPEN_CLIP: "/"}.get(self.scheme, "")
        revision = f"{tail}{self.revision}" if self.revision else ""
        return f"{self.scheme.value}:{self.location}{revision}" + (f"/{self.file}" if self.file else "")


def check_url(url: str) -> str:
    """Return `url` if it may be fetched: https anywhere, http only from this machine. Raises HubError."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        parts.port  # noqa: B018 - reading it is what validates it
    except ValueError as error:
        raise HubError(f"not a URL: {url!r} ({error})") from None
    if not host:
        raise HubError(f"URL {url!r} names no host")
    if parts.username or parts.password:
        raise HubError(f"URL for host {host!r} carries a user name or password; these end up in logs and are not sent")
    if parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(host)):
        return url
    raise HubError(f"URL {url!r}: only https is fetched (http only from a loopback host such as localhost)")


def check_inner(path: str, what: str) -> str:
    """Return `path` if it is relative and stays inside its folder. Raises HubError."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\\" in path or ".." in parts or ":" in parts[0]:
        raise HubError(f"{what}: {path!r} must be a relative path that stays inside its folder")
    return path


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _forms() -> str:
    return ", ".join(FORMS.values())


def _malformed(text: str, scheme: Scheme) -> HubError:
    return HubError(f"malformed weights source {text!r}; the form is {FORMS[scheme]}")


def _timm(text: str, rest: str) -> Source:
    arch, dot, tag = rest.partition(".")
    if not _NAME.fullmatch(rest) or (dot and not tag):
        raise _malformed(text, Scheme.TIMM)
    return Source(Scheme.TIMM, arch, revision=tag or None)


def _open_clip(text: str, rest: str) -> Source:
    arch, _, tag = rest.partition("/")
    if not _NAME.fullmatch(arch) or not _NAME.fullmatch(tag):
        raise _malformed(text, Scheme.OPEN_CLIP)
    return Source(Scheme.OPEN_CLIP, arch, revision=tag)


def _hf_hub(text: str, rest: str) -> Source:
    head, colon, file = rest.partition(":")
    repo, at, revision = head.partition("@")
    bad_revision = bool(at) and (not revision or ".." in revision or revision.startswith(("/", "-")))
    if not _REPO.fullmatch(repo) or bad_revision or (colon and not file):
        raise _malformed(text, Scheme.HF_HUB)
    inner = check_inner(file, f"file in weights source {text!r}") if file else None
    return Source(Scheme.HF_HUB, repo, revision=revision or None, file=inner)


def _url(text: str, rest: str) -> Source:
    return Source(Scheme(text.partition(":")[0]), check_url(text))


def _file(text: str, rest: str) -> Source:
    if rest.startswith("//"):  # a file URI: percent escapes count, and only this machine can be meant
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise HubError(f"weights source {text!r} names the host {parts.netloc!r}; only local files can be read")
        rest = unquote(parts.path)
    if not rest:
        raise _malformed(text, Scheme.FILE)
    return Source(Scheme.FILE, rest)


def _pip(text: str, rest: str) -> Source:
    package, slash, inside = rest.partition("/")
    if not _NAME.fullmatch(package) or (slash and not inside):
        raise _malformed(text, Scheme.PIP)
    inner = check_inner(inside, f"path in weights source {text!r}") if inside else None
    return Source(Scheme.PIP, package, file=inner)


_PARSERS = {
    Scheme.TIMM: _timm,
    Scheme.OPEN_CLIP: _open_clip,
    Scheme.HF_HUB: _hf_hub,
    Scheme.HTTPS: _url,
    Scheme.HTTP: _url,
    Scheme.FILE: _file,
    Scheme.PIP: _pip,
}
