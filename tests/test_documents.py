"""What the documents show must work: the worked example, the README's code, the links."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import timm
import torch

from zoo.adapters.inject import attach, merge, unmerge

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_worked_adapter_keeps_its_promises(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    assert code is not None
    file = tmp_path / "channel_gain.py"
    file.write_text(code[1])
    spec = importlib.util.spec_from_file_location("channel_gain", file)
    assert spec is not None and spec.loader is not None
    sys.modules["channel_gain"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    base = model(x)
    attached = attach(model, "ChannelGain")
    assert sum(p.numel() for p in attached.parameters()) == 192 + 768
    assert torch.equal(model(x), base)
    for parameter in attached.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    out = model(x)
    out.sum().backward()
    assert all(p.grad is not None for p in attached.parameters())
    merge(model)
    torch.testing.assert_close(model(x), out, atol=1e-5, rtol=1e-5)
    unmerge(model)
    assert torch.equal(model(x), out)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text)
    lost = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    named = re.findall(r"`((?:zoo|backbones|heads|tasks|configs|tools|tests|docs)/[\w/.]+\.(?:py|md))`", text)
    example = {"zoo/adapters/channel_gain.py"}
    lost += [name for name in named if name not in example and not (ROOT / name).exists()]
    assert not lost
