"""Consistency losses: the authors' tensors, gradients, and the two forwards together."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_checks import golden, shake, vit
from torch import Tensor

from zoo.adapters.consistency import CONSISTENCY, SymmetricKL, hidden_distance, symmetric_kl, two_pass_losses
from zoo.adapters.inject import attach
from zoo.errors import OptionError, UnknownNameError


def test_golden_symmetric_kl_and_its_gradient() -> None:
    tensors, _ = golden("mosa/losses")
    a, b = tensors["in.logits_a"].requires_grad_(), tensors["in.logits_b"].requires_grad_()
    loss = symmetric_kl(a, b)
    torch.testing.assert_close(loss, tensors["out.sym_kl"].squeeze(), atol=1e-5, rtol=1e-5)
    loss.backward()
    torch.testing.assert_close(a.grad, tensors["grad.logits_a"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(b.grad, tensors["grad.logits_b"], atol=1e-5, rtol=1e-5)


def test_golden_deep_term() -> None:
    tensors, _ = golden("mosa/losses")
    distance = hidden_distance([*tensors["in.hidden_a"]], [*tensors["in.hidden_b"]])
    torch.testing.assert_close(0.01 * distance, tensors["out.deepreg"].squeeze(), atol=1e-5, rtol=1e-5)


def test_without_detaching_it_is_r_drops_loss() -> None:
    a, b = (torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda p, q: symmetric_kl(p, q, detach=False), (a, b))
    torch.testing.assert_close(symmetric_kl(a, b, detach=False), symmetric_kl(b, a))


def test_positions_count_as_rows_and_half_precision_is_summed_in_float() -> None:
    a, b = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    torch.testing.assert_close(symmetric_kl(a, b), symmetric_kl(a.view(6, 5), b.view(6, 5)))
    assert symmetric_kl(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_two_passes_with_stochastic_experts() -> None:
    model = vit().train()
    attached = attach(model, dict(type="MoSA", width=6, dropout=0.0))
    shake(attached, 1.0)
    x, target = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    term = CONSISTENCY.create(dict(type="SymmetricKL", weight=2.0, second=0.5))

    def loss(logits: Tensor) -> dict[str, Tensor]:
        return {"loss_cls": F.cross_entropy(logits, target), "accuracy": (logits.argmax(1) == target).float().mean()}

    torch.manual_seed(3)
    losses = two_pass_losses(lambda: model(x), loss, [term])
    assert set(losses) == {"loss_cls", "accuracy", "loss_symmetric_kl", "second_loss_cls"}
    torch.manual_seed(3)
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    torch.testing.assert_close(losses["loss_symmetric_kl"], 2 * symmetric_kl(first, second))
    torch.testing.assert_close(losses["second_loss_cls"], 0.5 * F.cross_entropy(second, target))
    assert losses["loss_symmetric_kl"] > 0
    sum(value for key, value in losses.items() if "loss" in key).backward()
    assert all(p.grad is not None for p in attached.parameters())


def test_equal_passes_cost_nothing() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    loss = symmetric_kl(logits, logits)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize("wrong", [dict(weight=0.0), dict(weight=float("nan")), dict(second=-1.0)], ids=str)
def test_wrong_options(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError):
        SymmetricKL(**wrong)


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(UnknownNameError, match="SymmetricKL"):
        CONSISTENCY.create("SymmetricKl")
    with pytest.raises(OptionError, match="dict"):
        SymmetricKL()({}, {})
    with pytest.raises(OptionError, match="blocks"):
        hidden_distance([torch.zeros(1)], [])
    x = torch.randn(2, 3)
    with pytest.raises(OptionError, match="loss_symmetric_kl"):
        two_pass_losses(lambda: x, lambda logits: {}, [SymmetricKL(), SymmetricKL()])
