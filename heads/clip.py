"""CLIP's classifier: class names put into sentences, encoded by the text tower, compared with the image by angle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.classification import ClassificationHead
from zoo.errors import OptionError
from zoo.registry import HEADS

_CHUNK = 256  # sentences encoded at once; bounds the memory of 1,000 classes in 80 sentences each


@HEADS.register_module()
class CLIPZeroShotHead(ClassificationHead):
    """logits_k = exp(logit_scale) cos(image, text_k): (B, D) -> (B, K).

    text_k is the normalised mean of the normalised embeddings of all sentences of class k (Radford et al. 2021,
    arXiv 2103.00020, sec. 3.1). The head owns no weights: logit scale and text tower are the model's.

    Text features are computed again only when something they depend on has changed: once where the text tower is
    frozen, at every step while it (or an adapter on it) trains, once for an evaluation.

    Args:
        model: an `OpenCLIPModel`; `CLIPClassifier` fills it in from its backbone.
        classes: class names in label order; underscores are read as blanks.
        templates: sentences with one `{}` for the class name.
        label_smoothing: see `ClassificationHead`.

    Raises:
        OptionError: no templates, a template without `{}`, equal class names, a sentence that is too long.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        classes: Sequence[str],
        templates: Sequence[str] = ("a photo of a {}.",),
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(len(classes), label_smoothing)
        self.classes = tuple(str(name).replace("_", " ") for name in classes)
        self.templates = (templates,) if isinstance(templates, str) else tuple(templates)
        _check(model, self.classes, self.templates)
        # A tuple hides the model from nn.Module: its weights belong to the backbone, not to the head.
        self._model: tuple[Any] = (model,)
        self._kept: tuple[tuple[Any, ...], Tensor] | None = None
        self.register_buffer("tokens", model.tokenize(self.sentences()), persistent=False)  # type: ignore[operator]

    def sentences(self) -> list[str]:
        """All K * T sentences, those of one class together."""
        return [template.format(name) for name in self.classes for template in self.templates]

    def forward(self, features: Tensor) -> Tensor:
        """Image embeddings (B, D) -> logits (B, K), in fp32."""
        model = self._model[0]
        text = self.text_features()
        with _exactly(features):  # a scale of 100 would make half precision visible
            image = F.normalize(features.float(), dim=-1)
            logits = model.logit_scale.float().exp() * (image @ text.float().T)
            bias = getattr(model, "logit_bias", None)  # SigLIP has one
            scores: Tensor = logits if bias is None else logits + bias.float()
        return scores

    def text_features(self) -> Tensor:
        """(K, D), each of length 1; with gradients where the text tower trains."""
        tower = self._model[0].text
        trains = any(p.requires_grad for p in tower.parameters())
        if torch.compiler.is_compiling() or (trains and (self.training or torch.is_grad_enabled())):
            return self._encode()
        state = _state(tower)
        if self._kept is None or self._kept[0] != state:
            # Tensors made in inference mode could not be used in training afterwards; done once, it is done exactly.
            with torch.inference_mode(False), torch.no_grad(), _exactly(self.tokens):
                self._kept = (state, self._encode())
        return self._kept[1]

    def train(self, mode: bool = True) -> CLIPZeroShotHead:
        """Set the mode; what was kept in the other mode is forgotten (dropout, averaged weights)."""
        if mode != self.training:
            self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles need no cache
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        return f"{self.num_classes} classes, {len(self.templates)} templates such as {self.templates[0]!r}"

    def _encode(self) -> Tensor:
        model: Any = self._model[0]
        tokens: Any = self.tokens
        parts = [model.encode_text(chunk, normalize=True) for chunk in tokens.split(_CHUNK)]
        sentences = torch.cat(parts).view(self.num_classes, len(self.templates), -1)
        return F.normalize(sentences.mean(1), dim=-1)


def _exactly(like: Any) -> torch.autocast:
    """Full precision within a region of automatic half precision."""
    return torch.autocast(like.device.type, enabled=False)


def _state(tower: nn.Module) -> tuple[Any, ...]:
    """Equal only while the tower computes the same: its weights, in place and at the same version, and what runs."""
    weights = [(p.data_ptr(), p._version) for p in tower.parameters()]
    running = [(id(adapter), adapter.training) for m in tower.modules() for adapter in m.__dict__.get("_active", ())]
    return (*weights, *running)


def _check(model: nn.Module, classes: Sequence[str], templates: Sequence[str]) -> None:
    if not hasattr(model, "tokenize") or not hasattr(model, "encode_text"):
        raise OptionError(
            f"CLIPZeroShotHead needs a model with both towers, got a {type(model).__name__}; "
            "use backbone=dict(type='OpenCLIPModel', name=...)"
        )
    if not templates:
        raise OptionError("give at least one template, such as 'a photo of a {}.'")
    for template in templates:
        if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
            raise OptionError(f"a template has one {{}} for the class name, got {template!r}")
    twice = sorted({name for name in classes if list(classes).count(name) > 1})
    if twice:
        raise OptionError(f"classes {twice[:5]} occur more than once; no sentence could tell them apart")
