"""The hub: downloads and uploads against a loopback server, through the real clients."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, Repo, commit_id
from safetensors.torch import save_file

from zoo.errors import (
    HubError,
    OfflineError,
    OptionError,
    UnknownNameError,
)
from zoo.hub import (
    fetch,
    push_folder,
)
from zoo.hub.download import download
from zoo.hub.resolve import cached_path

BODY = bytes(range(256)) * 400


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ZOO_OFFLINE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "zoo-cache"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        # The other tests run offline, and huggingface_hub reads that once, when it is imported.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield running


@pytest.fixture
def dead_url() -> str:
    """A loopback address where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


class TestLocal:
    def test_file_folder_and_hash(self, tmp_path: Path) -> None:
        file = tmp_path / "w.bin"
        file.write_bytes(BODY)
        assert fetch(str(file), sha256=sha(BODY).upper()) == file
        assert fetch(f"file:{file}") == file
        assert fetch(str(tmp_path)) == tmp_path

    def test_wrong_hash_names_both_and_keeps_the_file(self, tmp_path: Path) -> None:
        file = tmp_path / "w.bin"
        file.write_bytes(BODY)
        with pytest.raises(HubError) as caught:
            fetch(str(file), sha256="0" * 64)
        assert sha(BODY) in str(caught.value) and "0" * 64 in str(caught.value)
        assert file.read_bytes() == BODY

    def test_missing(self) -> None:
        with pytest.raises(HubError, match=r"no file or folder nowhere\.pth.*hf-hub:"):
            fetch("nowhere.pth")

    def test_bad_hash_arguments(self, tmp_path: Path) -> None:
        with pytest.raises(OptionError, match="64 hex digits"):
            fetch(str(tmp_path), sha256="abc")
        with pytest.raises(OptionError, match="folder"):
            fetch(str(tmp_path), sha256="0" * 64)


class TestDownload:
    def test_lands_once_and_is_reused(self, server: HubServer, tmp_path: Path) -> None:
        server.files["/w.bin"] = BODY
        path = fetch(f"{server.url}/w.bin", sha256=sha(BODY))
        assert path.read_bytes() == BODY and path.is_relative_to(tmp_path / "zoo-cache")
        assert fetch(f"{server.url}/w.bin") == path
        assert len(server.gets("/w.bin")) == 1
        assert not list(path.parent.glob("*.part*"))

    def test_query_decides_the_cache_place(self, server: HubServer) -> None:
        assert cached_path(f"{server.url}/w?v=1") != cached_path(f"{server.url}/w?v=2")

    @pytest.mark.parametrize("headers", [{"ETag": '"v1"'}, {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}])
    def test_cut_connection_resumes_with_range(
        self, server: HubServer, tmp_path: Path, headers: dict[str, str]
    ) -> None:
        server.files["/w.bin"], server.headers["/w.bin"] = BODY, headers
        server.cuts["/w.bin"] = [1000, 500]
        path = download(f"{server.url}/w.bin", tmp_path / "w.bin", pause=0)
        assert path.read_bytes() == BODY
        assert [each.headers.get("Range") for each in server.gets("/w.bin")] == [None, "bytes=1000-", "bytes=1500-"]
        assert server.gets("/w.bin")[1].headers["If-Range"] in headers.values()

    def test_server_without_range_starts_over(self, server: HubServer, tmp_path: Path) -> None:
        server.files["/w.bin"] = BODY
        server.cuts["/w.bin"], server.no_range = [1000], {"/w.bin"}
        assert download(f"{server.url}/w.bin", tmp_path / "w", sha256=sha(BODY), pause=0).read_bytes() == BODY

    def test_untagged_file_is_not_joined_without_a_hash(self, server: HubServer, tmp_path: Path) -> None:
        server.files["/w.bin"], server.headers["/w.bin"] = BODY, {"ETag": 'W/"weak"'}
        server.cuts["/w.bin"] = [1000]
        assert download(f"{server.url}/w.bin", tmp_path / "w", pause=0).read_bytes() == BODY
        assert all("Range" not in each.headers for each in server.gets("/w.bin"))

    def test_never_whole_is_an_error_that_keeps_the_part(self, server: HubServer, tmp_path: Path) -> None:
        server.files["/w.bin"], server.headers["/w.bin"] = BODY, {"ETag": '"v1"'}
        server.cuts["/w.bin"] = [1000] + [0] * 20
        with pytest.raises(HubError, match="stopped after 1000 bytes"):
            download(f"{server.url}/w.bin", tmp_path / "w", pause=0)
        assert not (tmp_path / "w").exists() and (tmp_path / "w.part").stat().st_size == 1000
        server.cuts.clear()
        server.log.clear()
        assert download(f"{server.url}/w.bin", tmp_path / "w", pause=0).read_bytes() == BODY
        assert server.gets("/w.bin")[0].headers["Range"] == "bytes=1000-"

    def test_file_changed_between_attempts(self, server: HubServer, tmp_path: Path) -> None:
        (tmp_path / "w.part").write_bytes(b"old" * 100)
        (tmp_path / "w.part.tag").write_text('"v1"')
        server.files["/w.bin"], server.headers["/w.bin"] = BODY, {"ETag": '"v2"'}
        assert download(f"{server.url}/w.bin", tmp_path / "w", pause=0).read_bytes() == BODY

    def test_part_longer_than_the_file(self, server: HubServer, tmp_path: Path) -> None:
        (tmp_path / "w.part").write_bytes(b"x" * (len(BODY) + 1))
        server.files["/w.bin"] = BODY
        assert download(f"{server.url}/w.bin", tmp_path / "w", sha256=sha(BODY), pause=0).read_bytes() == BODY

    def test_part_already_whole(self, server: HubServer, tmp_path: Path) -> None:
        (tmp_path / "w.part").write_bytes(BODY)
        server.files["/w.bin"] = BODY
        assert download(f"{server.url}/w.bin", tmp_path / "w", sha256=sha(BODY), pause=0).read_bytes() == BODY
        assert len(server.gets("/w.bin")) == 1

    def test_wrong_hash_removes_the_download_and_keeps_the_good_file(self, server: HubServer) -> None:
        server.files["/w.bin"] = BODY
        good = fetch(f"{server.url}/w.bin")
        server.files["/w.bin"] = b"tampered"
        with pytest.raises(HubError) as caught:
            fetch(f"{server.url}/w.bin", sha256="1" * 64)
        assert "1" * 64 in str(caught.value) and sha(b"tampered") in str(caught.value)
        assert good.read_bytes() == BODY
        assert {p.suffix for p in good.parent.iterdir()} <= {".bin", ".lock"}

    def test_size_limit(self, server: HubServer, tmp_path: Path) -> None:
        server.files["/w.bin"] = BODY
        with pytest.raises(HubError, match="limit of 100"):
            download(f"{server.url}/w.bin", tmp_path / "w", max_bytes=100, pause=0)
        assert not (tmp_path / "w").exists() and not (tmp_path / "w.part").exists()

    def test_busy_server_is_asked_again_but_missing_is_final(self, server: HubServer, tmp_path: Path) -> None:
        server.files["/w.bin"] = BODY
        server.status["/w.bin"] = [503, 429]
        assert download(f"{server.url}/w.bin", tmp_path / "w", pause=0).read_bytes() == BODY
        with pytest.raises(HubError, match="HTTP 404"):
            download(f"{server.url}/none", tmp_path / "n", pause=0)
        assert len(server.gets("/none")) == 1

    def test_redirect_may_not_leave_the_rules(self, server: HubServer, tmp_path: Path) -> None:
        server.files["/w.bin"] = BODY
        server.redirects = {"/ok": f"{server.url}/w.bin", "/bad": "http://example.com/w.bin", "/ftp": "ftp://h/w"}
        assert download(f"{server.url}/ok", tmp_path / "ok", pause=0).read_bytes() == BODY
        for path in ("/bad", "/ftp"):
            with pytest.raises(HubError, match="only https"):
                download(f"{server.url}{path}", tmp_path / "w", pause=0)

    def test_silence_times_out(self, tmp_path: Path) -> None:
        with socket.socket() as mute:
            mute.bind(("127.0.0.1", 0))
            mute.listen()  # accepts, never answers
            with pytest.raises(HubError, match="timed out"):
                download(f"http://127.0.0.1:{mute.getsockname()[1]}/w", tmp_path / "w", timeout=0.05, pause=0)

    def test_unreachable(self, dead_url: str, tmp_path: Path) -> None:
        with pytest.raises(OfflineError, match="could not be reached") as caught:
            download(f"{dead_url}/w.bin", tmp_path / "w.bin", pause=0)
        assert str(caught.value).endswith(str(tmp_path / "w.bin"))

    def test_offline(self, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        url = f"{server.url}/w.bin"
        server.files["/w.bin"] = BODY
        monkeypatch.setenv("ZOO_OFFLINE", "1")
        with pytest.raises(OfflineError) as caught:
            fetch(url)
        assert url in str(caught.value) and str(cached_path(url)) in str(caught.value)
        assert not server.log
        path = fetch(url, offline=False)
        assert fetch(url) == path
        with pytest.raises(OfflineError, match=sha(BODY)):
            fetch(url, sha256="2" * 64)


@pytest.fixture
def repo(server: HubServer) -> Repo:
    repo = server.repos["org/tiny"] = Repo()
    repo.commit({"config.json": b"{}", "sub/model.safetensors": BODY})
    return repo


class TestHuggingFace:
    def test_file(self, server: HubServer, repo: Repo, tmp_path: Path) -> None:
        path = fetch("hf-hub:org/tiny:sub/model.safetensors", cache_dir=tmp_path, sha256=sha(BODY))
        assert path.read_bytes() == BODY and path.is_relative_to(tmp_path)
        fetch("hf-hub:org/tiny:sub/model.safetensors", cache_dir=tmp_path)
        assert len(server.gets("/org/tiny/resolve/main/sub/model.safetensors")) == 1

    def test_folder_and_revision(self, repo: Repo, tmp_path: Path) -> None:
        first = repo.refs["main"]
        repo.commit({"config.json": b'{"v": 2}'})
        folder = fetch("hf-hub:org/tiny", cache_dir=tmp_path)
        assert tree(folder) == {"config.json": b'{"v": 2}', "sub/model.safetensors": BODY}
        assert (fetch(f"hf-hub:org/tiny@{first}", cache_dir=tmp_path) / "config.json").read_bytes() == b"{}"
        assert fetch(f"hf-hub:org/tiny@{first}:config.json", cache_dir=tmp_path).read_bytes() == b"{}"

    def test_cut_connection_resumes(self, server: HubServer, repo: Repo, tmp_path: Path) -> None:
        from huggingface_hub import constants

        # The client keeps only whole pieces of this size, so the cut has to come after the first one.
        body = BODY * (2 * constants.DOWNLOAD_CHUNK_SIZE // len(BODY))
        repo.commit({"big.bin": body})
        server.cuts["/org/tiny/resolve/main/big.bin"] = [constants.DOWNLOAD_CHUNK_SIZE + 1000]
        path = fetch("hf-hub:org/tiny:big.bin", cache_dir=tmp_path, sha256=sha(body))
        assert path.stat().st_size == len(body)
        ranges = [
            {name.lower(): value for name, value in each.headers.items()}.get("range")
            for each in server.gets("/org/tiny/resolve/main/big.bin")
        ]
        assert ranges == [None, f"bytes={constants.DOWNLOAD_CHUNK_SIZE}-"]

    def test_wrong_hash(self, repo: Repo, tmp_path: Path) -> None:
        with pytest.raises(HubError, match=sha(b"{}")):
            fetch("hf-hub:org/tiny:config.json", cache_dir=tmp_path, sha256="3" * 64)

    @pytest.mark.parametrize(
        ("source", "says"),
        [
            ("hf-hub:org/none", "Repository Not Found"),
            ("hf-hub:org/tiny@nope", "Revision Not Found"),
            ("hf-hub:org/tiny:nope.bin", "Entry Not Found"),
        ],
    )
    def test_missing(self, repo: Repo, tmp_path: Path, source: str, says: str) -> None:
        with pytest.raises(HubError, match=says):
            fetch(source, cache_dir=tmp_path)

    @pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "ZOO_OFFLINE"])
    def test_offline(
        self, server: HubServer, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
    ) -> None:
        monkeypatch.setenv(variable, "1")
        with pytest.raises(OfflineError, match=r"hf download org/tiny config\.json") as caught:
            fetch("hf-hub:org/tiny:config.json", cache_dir=tmp_path)
        assert str(tmp_path / "models--org--tiny") in str(caught.value) and server.url in str(caught.value)
        assert not server.log
        fetch("hf-hub:org/tiny", cache_dir=tmp_path, offline=False)
        assert tree(fetch("hf-hub:org/tiny", cache_dir=tmp_path))["config.json"] == b"{}"
        assert fetch("hf-hub:org/tiny:config.json", cache_dir=tmp_path).read_bytes() == b"{}"

    def test_one_cached_file_is_not_the_repository(self, repo: Repo, tmp_path: Path) -> None:
        fetch("hf-hub:org/tiny:config.json", cache_dir=tmp_path)
        with pytest.raises(OfflineError, match="not completely in the local cache"):
            fetch("hf-hub:org/tiny", cache_dir=tmp_path, offline=True)

    def test_unreachable_uses_the_cache(
        self, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead_url: str
    ) -> None:
        folder = fetch("hf-hub:org/tiny", cache_dir=tmp_path)
        monkeypatch.setenv("HF_ENDPOINT", dead_url)
        assert fetch("hf-hub:org/tiny", cache_dir=tmp_path) == folder
        with pytest.raises(OfflineError, match="could not be reached"):
            fetch("hf-hub:org/other", cache_dir=tmp_path)

    def test_timm_source(self, server: HubServer, tmp_path: Path) -> None:
        mirror = server.repos["timm/resnet18.a1_in1k"] = Repo()
        mirror.commit({"pytorch_model.bin": BODY})
        assert fetch("timm:resnet18.a1_in1k", cache_dir=tmp_path).name == "pytorch_model.bin"
        mirror.commit({"model.safetensors": b"safe"})
        assert fetch("timm:resnet18", cache_dir=tmp_path).read_bytes() == b"safe"  # safetensors first
        assert fetch("timm:resnet18", cache_dir=tmp_path, offline=True).read_bytes() == b"safe"
        with pytest.raises(OfflineError, match="resnet34"):
            fetch("timm:resnet34", cache_dir=tmp_path, offline=True)

    def test_open_clip_source(self, server: HubServer, tmp_path: Path) -> None:
        repo = server.repos["laion/CLIP-ViT-B-32-laion2B-s34B-b79K"] = Repo()
        repo.commit({"open_clip_pytorch_model.bin": BODY})
        assert fetch("open_clip:ViT-B-32/laion2b_s34b_b79k", cache_dir=tmp_path).read_bytes() == BODY

    @pytest.mark.parametrize(
        ("source", "says"),
        [
            ("timm:resnet81", "did you mean 'resnet18'"),
            ("timm:resnet18.a1_in2k", "did you mean 'a1_in1k'"),
            ("open_clip:ViT-B-23/openai", "did you mean 'ViT-B-32'"),
            ("open_clip:ViT-B-32/openia", "did you mean 'openai'"),
        ],
    )
    def test_unknown_model(self, source: str, says: str) -> None:
        with pytest.raises(UnknownNameError, match=says):
            fetch(source, offline=True)


class TestPush:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "model"
        (folder / "sub").mkdir(parents=True)
        (folder / "README.md").write_text("---\nlicense: mit\n---\nA card.\n")
        save_file({"a": torch.arange(3)}, folder / "sub" / "adapter.safetensors")
        return folder

    def test_upload_then_fetch(self, server: HubServer, folder: Path, tmp_path: Path) -> None:
        url = push_folder(folder, "me/new", private=True, token=server.token, commit_message="first")
        assert url == f"{server.url}/me/new/commit/{server.repos['me/new'].refs['main']}"
        assert tree(fetch("hf-hub:me/new", cache_dir=tmp_path / "cache")) == tree(folder)

    def test_existing_repository_and_branch(self, server: HubServer, folder: Path) -> None:
        server.repos["me/old"] = Repo(refs={"main": commit_id("m")}, trees={commit_id("m"): {"keep": b"1"}})
        push_folder(folder, "me/old", token=server.token, revision="v2")
        old = server.repos["me/old"]
        assert set(old.trees[old.refs["v2"]]) == {"keep", "README.md", "sub/adapter.safetensors"}
        assert set(old.trees[old.refs["main"]]) == {"keep"}

    def test_refused(self, server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(HubError, match="401") as caught:
            push_folder(folder, "me/new", token="hf_wrong")
        assert "hf_wrong" not in str(caught.value)
        with pytest.raises(HubError, match="nothing to upload"):
            push_folder(folder / "none", "me/new", token=server.token)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(OfflineError, match="hf upload me/new"):
            push_folder(folder, "me/new", token=server.token)
        assert "me/new" not in server.repos

    def test_no_token(self, folder: Path, tmp_path: Path) -> None:
        # The client fixes the place of its token file when imported, so a stored one could hide the error here.
        code = f"from zoo.hub import push_folder; push_folder({str(folder)!r}, 'me/new')"
        env = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"} | {"HF_HOME": str(tmp_path / "hf")}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
        assert "needs a token with write access" in done.stderr
