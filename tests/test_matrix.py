"""Every adapter of the core on every backbone family keeps every property, or says why the two do not fit."""

from __future__ import annotations

import pytest
from matrix_families import FAMILIES, build
from matrix_properties import METHODS, PROPERTIES, UNFIT, Pair

from zoo.errors import SiteError

PAIRS = [Pair(family, method) for family in FAMILIES for method in METHODS]
FIT = [pair for pair in PAIRS if pair not in UNFIT]
# Tracing takes seconds a pair: every method once, every family once with LoRA, and the forms that remain.
TRACED = [
    pair
    for pair in FIT
    if pair.family == "ViT"
    or pair.method == "LoRA"
    or pair in {Pair("PoolFormer", "Houlsby"), Pair("open_clip ViT", "SSF"), Pair("open_clip ViT", "VPT deep")}
]
SLOW = ("compile", "export")


def _name(value: object) -> str:
    return "-".join(value) if isinstance(value, Pair) else str(value)


@pytest.mark.parametrize("pair", FIT, ids=_name)
@pytest.mark.parametrize("name", [name for name in PROPERTIES if name not in SLOW])
def test_property(name: str, pair: Pair) -> None:
    PROPERTIES[name](pair)


@pytest.mark.parametrize("pair", TRACED, ids=_name)
@pytest.mark.parametrize("name", SLOW)
def test_tracing(name: str, pair: Pair) -> None:
    PROPERTIES[name](pair)


@pytest.mark.parametrize("pair", UNFIT, ids=_name)
def test_unfit_pair_says_why_and_changes_nothing(pair: Pair) -> None:
    model = build(pair.family).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(SiteError, match=UNFIT[pair]):
        pair.attached(model=model)
    after = model.state_dict()
    assert [*after] == [*before] and all((after[key] == tensor).all() for key, tensor in before.items())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
