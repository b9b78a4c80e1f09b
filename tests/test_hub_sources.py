"""Error texts and the parsing of weights sources."""

from __future__ import annotations

import subprocess
import sys

import pytest

from zoo.errors import (
    CheckpointFileError,
    HubError,
    OfflineError,
    OptionError,
    UnknownNameError,
    ZooError,
    nearest,
)
from zoo.hub import Scheme, Source


class TestErrors:
    def test_message_is_readable_although_a_key_error(self) -> None:
        error = UnknownNameError("no 'x'\nhere")
        assert isinstance(error, KeyError) and isinstance(error, ZooError)
        assert str(error) == "no 'x'\nhere"

    def test_builtin_bases(self) -> None:
        assert issubclass(OptionError, TypeError) and issubclass(HubError, OSError)
        assert issubclass(OfflineError, HubError) and issubclass(CheckpointFileError, ValueError)

    def test_nearest(self) -> None:
        assert nearest("lroa", ["LoRA", "DoRA", "VPT"]).startswith("did you mean 'LoRA'")
        assert nearest("zzz", ["b", "a"]) == "known: a, b"
        assert nearest("zzz", [f"name{i}" for i in range(30)]).endswith("and 10 more")


class TestSource:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("timm:resnet18", Source(Scheme.TIMM, "resnet18")),
            ("timm:resnet18.a1_in1k", Source(Scheme.TIMM, "resnet18", "a1_in1k")),
            ("open_clip:ViT-B-32/openai", Source(Scheme.OPEN_CLIP, "ViT-B-32", "openai")),
            ("hf-hub:org/name", Source(Scheme.HF_HUB, "org/name")),
            ("hf-hub:org/name@refs/pr/1:a/b.bin", Source(Scheme.HF_HUB, "org/name", "refs/pr/1", "a/b.bin")),
            ("https://host/a?b=c:d@e", Source(Scheme.HTTPS, "https://host/a?b=c:d@e")),
            ("http://127.0.0.1:8080/a", Source(Scheme.HTTP, "http://127.0.0.1:8080/a")),
            ("http://[::1]/a", Source(Scheme.HTTP, "http://[::1]/a")),
            ("file:/a b/c", Source(Scheme.FILE, "/a b/c")),
            ("pip:some-package", Source(Scheme.PIP, "some-package")),
            ("pip:some-package/models/x.pth", Source(Scheme.PIP, "some-package", None, "models/x.pth")),
        ],
    )
    def test_round_trip(self, text: str, expected: Source) -> None:
        assert Source.parse(text) == expected
        assert str(expected) == text

    @pytest.mark.parametrize("text", ["weights.pth", "./a:b", "/x:y/z", "~/w.pth", "C:\\models\\w.pth"])
    def test_bare_path(self, text: str) -> None:
        assert Source.parse(text) == Source(Scheme.FILE, text)

    def test_file_uri_is_decoded(self) -> None:
        assert Source.parse("file:///a%20b").location == "/a b"

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "  ",
            "timm:",
            "timm:resnet18.",
            "timm:../x",
            "open_clip:ViT-B-32",
            "hf-hub:name",
            "hf-hub:org/name@",
            "hf-hub:org/name:",
            "hf-hub:org/name@a/../b",
            "hf-hub:org/name:../secret",
            "hf-hub:org/name:/etc/passwd",
            "hf-hub:org/name:a\\..\\b",
            "hf-hub:../name",
            "http://example.com/a",
            "http://127.0.0.1.example.com/a",
            "https:///a",
            "https://user:word@host/a",
            "https://host:port/a",
            "file:",
            "file://other-host/a",
            "pip:package/../../x.pth",
            "pip:/x",
            "hf-hub:org/na\nme",
        ],
    )
    def test_malformed(self, text: str) -> None:
        with pytest.raises(HubError):
            Source.parse(text)

    def test_unknown_scheme_names_nearest_and_all(self) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'hf-hub'") as caught:
            Source.parse("hf_hub:org/name")
        assert all(scheme.value in str(caught.value) for scheme in Scheme)


def test_import_needs_no_torch() -> None:
    code = "import sys, zoo.hub, zoo.errors; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "timm", "open_clip", "huggingface_hub"} & set(done.stdout.split())
