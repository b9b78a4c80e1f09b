"""open_clip's towers and whole models with timm's protocol: ViT, text transformer, ResNet, any timm trunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from open_clip.coca_model import CoCa
from open_clip.model import CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer, text_global_pool
from timm.models import group_parameters
from timm.models._features import feature_take_indices
from timm.models._manipulate import MATCH_PREV_GROUP
from torch import Tensor, nn

from backbones.open_clip_protocol import Indices, Protocol, Tower, change_class, check_format
from zoo.errors import OptionError


class TransformerTower(Tower):
    """Blocks in `transformer.resblocks`, a norm at the end, a projection to the common space."""

    stem: ClassVar[str]
    end: ClassVar[str]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: stem, blocks; what follows them counts as part of the last one, as in timm's ViTs."""
        blocks = [(r"^transformer\.resblocks\.(\d+)", None), (self.end, MATCH_PREV_GROUP)]
        return {"stem": self.stem, "blocks": blocks}

    def _run(self, x: Tensor, mask: Tensor | None, indices: Indices, stop_early: bool) -> tuple[Tensor, list[Tensor]]:
        tower: Any = self
        found: tuple[Tensor, list[Tensor]] = tower.transformer.forward_intermediates(
            x, attn_mask=mask, indices=indices, stop_early=stop_early
        )
        return found


class VisionTower(TransformerTower):
    """open_clip's ViT."""

    stem = r"^class_embedding|positional_embedding|conv1|ln_pre"
    end = r"^ln_post|proj|attn_pool"

    @property
    def num_features(self) -> int:
        """Channels of the tokens."""
        return int(self.conv1.out_channels)  # type: ignore[attr-defined]

    embed_dim = num_features

    @property
    def head_hidden_size(self) -> int:
        """Channels of the pooled features before the projection."""
        return int(self.ln_post.normalized_shape[-1])  # type: ignore[attr-defined]

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """One entry a block, as timm has it: `module`, `num_chs`, `reduction`."""
        tower: Any = self
        return [
            {"module": f"transformer.resblocks.{i}", "num_chs": self.num_features, "reduction": tower.patch_size[0]}
            for i in range(len(tower.transformer.resblocks))
        ]

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + N, C), class token first; after the last norm where that comes before the pooling."""
        tower: Any = self
        tokens: Tensor = tower.transformer(tower._embeds(x))
        return tower.ln_post(tokens) if self._norm_first() else tokens

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens -> the embedding (B, D), or with `pre_logits` the pooled features (B, C) it is projected from."""
        tower: Any = self
        pooled: Tensor = (tower._global_pool if self._norm_first() else tower._pool)(x)[0]
        return pooled if pre_logits or tower.proj is None else pooled @ tower.proj

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **open_clip: bool,
    ) -> Any:
        """timm's: a list of (B, C, H, W) or, with "NLC", (B, N, C), one a block; or (final tokens, list).

        With keywords of open_clip's own (`normalize_intermediates`, `output_extra_tokens`), as open_clip's models
        call their towers, it answers in open_clip's way: a dict.
        """
        tower: Any = self
        if open_clip:
            return self._open_clip_way(x, indices, stop_early, intermediates_only, output_fmt, **open_clip)
        check_format(output_fmt, ("NCHW", "NLC"))
        if norm and tower.attn_pool is not None:
            raise OptionError("norm=True: the last norm of this tower follows its attention pooling; take norm=False")
        tokens, maps = self._run(tower._embeds(x), None, indices, stop_early)
        maps = [tower.ln_post(m) for m in maps] if norm else maps
        found: list[Any] = [m[:, 1:] for m in maps]
        if output_fmt == "NCHW":
            grid = [side // patch for side, patch in zip(x.shape[-2:], tower.patch_size, strict=True)]
            found = [m.transpose(1, 2).unflatten(2, grid).contiguous() for m in found]
        if return_prefix_tokens:
            found = [(spatial, m[:, :1]) for spatial, m in zip(found, maps, strict=True)]
        if intermediates_only:
            return found
        return (tower.ln_post(tokens) if self._norm_first() else tokens), found

    def _norm_first(self) -> bool:
        tower: Any = self
        return tower.attn_pool is None and not tower.final_ln_after_pool


class TextTower(TransformerTower):
    """open_clip's text transformer; what it takes are token numbers (B, L)."""

    stem = r"^token_embedding|positional_embedding|cls_emb"
    end = r"^ln_final|text_projection"

    @property
    def num_features(self) -> int:
        """Channels of the tokens, and of the pooled features before the projection."""
        return int(self.width)  # type: ignore[attr-defined]

    embed_dim = head_hidden_size = num_features

    def forward_features(self, text: Tensor) -> Tensor:
        """(B, L) int64 -> (B, L, C) after the last norm; with CoCa's class token (B, L + 1, C) before it."""
        tower: Any = self
        x, mask = tower._embeds(text)
        return self._end(tower.transformer(x, attn_mask=mask))

    def forward_head(self, x: Tensor, pre_logits: bool = False, text: Tensor | None = None) -> Tensor:
        """Tokens -> the embedding (B, D), or with `pre_logits` the pooled features (B, C) it is projected from.

        `text` are the token numbers (B, L), which say where a sentence ends.
        Raises OptionError: they are needed and were not given.
        """
        tower: Any = self
        pooled: Tensor
        if tower.cls_emb is not None:
            pooled = tower.ln_final(x[:, -1])
        elif text is None and tower.pool_type in ("argmax", "eos"):
            raise OptionError("the text tower pools where the sentence ends: call forward_head(features, text=tokens)")
        else:
            pooled = text_global_pool(x, text, tower.pool_type, tower.eos_id)
        projection = tower.text_projection
        if pre_logits or projection is None:
            return pooled
        projected: Tensor = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
        return projected

    def forward_intermediates(
        self,
        text: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NLC",
        intermediates_only: bool = False,
        **open_clip: bool,
    ) -> Any:
        """A list of (B, L, C), one a block, or (final tokens, list); open_clip's keywords as in the vision tower."""
        tower: Any = self
        if open_clip:
            return self._open_clip_way(text, indices, stop_early, intermediates_only, output_fmt, **open_clip)
        check_format(output_fmt, ("NLC",))
        x, mask = tower._embeds(text)
        tokens, maps = self._run(x, mask, indices, stop_early)
        maps = [tower.ln_final(m) for m in maps] if norm else maps
        if tower.cls_emb is not None:
            maps = [m[:, :-1] for m in maps]
        return maps if intermediates_only else (self._end(tokens), maps)

    def _end(self, tokens: Tensor) -> Tensor:
        tower: Any = self
        return tokens if tower.cls_emb is not None else tower.ln_final(tokens)


class ResNetTower(Tower):
    """open_clip's ResNet. Its attention pooling ends in the projection, so `pre_logits` changes nothing."""

    @property
    def num_features(self) -> int:
        """Channels of the last map."""
        return int(self.attnpool.q_proj.in_features)  # type: ignore[attr-defined]

    embed_dim = num_features

    @property
    def head_hidden_size(self) -> int:
        """Channels of the pooled features: the embedding's."""
        return int(self.output_dim)  # type: ignore[attr-defined]

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Five entries: the stem after its pooling, and four stages."""
        tower: Any = self
        stem = {"module": "avgpool", "num_chs": tower.bn3.num_features, "reduction": 4}
        stages = [
            {"module": f"layer{i}", "num_chs": stage[-1].bn3.num_features, "reduction": 2 ** (i + 1)}
            for i, stage in enumerate(self._stages()[1:], 1)
        ]
        return [stem, *stages]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: stem, stages (or, unless `coarse`, their blocks); the pooling belongs to the last."""
        blocks = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^conv\d|bn\d", "blocks": [(blocks, None), (r"^attnpool", MATCH_PREV_GROUP)]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Raises OptionError when switched on: open_clip's ResNet cannot."""
        if enable:
            raise OptionError("open_clip's ResNet towers have no gradient checkpointing")

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H / 32, W / 32)."""
        for stage in self._stages():
            x = stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map -> the embedding (B, D)."""
        return self.attnpool(x)  # type: ignore[attr-defined, no-any-return]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **open_clip: bool,
    ) -> Any:
        """A list of maps (B, C_i, H_i, W_i), or (last map, list); open_clip's keywords as in the vision tower."""
        if open_clip:
            last, maps = self.forward_intermediates(x, indices, output_fmt=output_fmt)
            features = {} if intermediates_only else {"image_features": self.forward_head(last)}
            return {"image_intermediates": maps, **features}
        check_format(output_fmt, ("NCHW",))
        if norm:
            raise OptionError("norm=True: a ResNet tower has no last norm")
        stages = self._stages()
        taken, deepest = feature_take_indices(len(stages), indices)
        maps = []
        for i, stage in enumerate(stages[: deepest + 1] if stop_early else stages):
            x = stage(x)
            if i in taken:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def _stages(self) -> tuple[Any, ...]:
        tower: Any = self
        return (tower.stem, tower.layer1, tower.layer2, tower.layer3, tower.layer4)


class TimmTower(Tower):
    """A timm model (`trunk`) and open_clip's projection (`head`)."""

    @property
    def num_features(self) -> int:
        """Channels of the trunk's features."""
        return int(self.trunk.num_features)  # type: ignore[attr-defined]

    embed_dim = num_features

    @property
    def head_hidden_size(self) -> int:
        """Channels of the pooled features before the projection."""
        head: Any = self.head  # type: ignore[attr-defined]
        first = getattr(head, "proj", None) or getattr(getattr(head, "mlp", None), "fc1", None)
        return int(self.trunk.head_hidden_size if first is None else first.in_features)  # type: ignore[attr-defined]

    @property
    def feature_info(self) -> Any:
        """The trunk's."""
        return self.trunk.feature_info  # type: ignore[attr-defined]

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """timm's layer groups: the trunk's; the projection is part of the last one."""
        trunk: Any = self.trunk  # type: ignore[attr-defined]
        layers = group_parameters(trunk, trunk.group_matcher(coarse=coarse), reverse=True)
        return lambda name: layers.get(name.removeprefix("trunk."), max(layers.values()))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """The trunk's; an error there is not swallowed, as open_clip would."""
        self.trunk.set_grad_checkpointing(enable)  # type: ignore[attr-defined]

    def forward_features(self, x: Tensor) -> Tensor:
        """The trunk's."""
        return self.trunk.forward_features(x)  # type: ignore[attr-defined, no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The trunk's features -> the embedding (B, D), or with `pre_logits` the pooled features before it."""
        tower: Any = self
        if not pre_logits:
            return tower.head(tower.trunk.forward_head(x))  # type: ignore[no-any-return]
        if not len(tower.head):  # the trunk's own classifier is the projection
            return tower.trunk.forward_head(x, pre_logits=True)  # type: ignore[no-any-return]
        pooled: Tensor = tower.trunk.forward_head(x)
        return tower.head.pool(pooled) if hasattr(tower.head, "pool") else pooled

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **open_clip: bool,
    ) -> Any:
        """The trunk's; open_clip's keywords as in the vision tower."""
        if open_clip:
            return self._open_clip_way(x, indices, stop_early, intermediates_only, output_fmt, **open_clip)
        return self.trunk.forward_intermediates(  # type: ignore[attr-defined]
            x, indices=indices, norm=norm, stop_early=stop_early, output_fmt=output_fmt,
            intermediates_only=intermediates_only,
        )  # fmt: skip


class DualEncoder(Protocol):
    """A whole CLIP: `visual`, `text`, `logit_scale`, and the tokenizer that belongs to it."""

    tokenizer_name: str  # set by the builder

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (N, L) int64 token numbers on the CPU.

        Raises OptionError: a text that does not fit into L tokens. OfflineError: the tokenizer must be fetched.
        """
        from backbones.open_clip_tower import tokenize

        return tokenize(self.tokenizer_name, int(self.context_length), texts)  # type: ignore[attr-defined]


KINDS: dict[type[nn.Module], type[Protocol]] = {
    VisionTransformer: VisionTower,
    ModifiedResNet: ResNetTower,
    TimmModel: TimmTower,
    TextTransformer: TextTower,
    CustomTextCLIP: DualEncoder,
    CoCa: DualEncoder,
}


def with_protocol(module: nn.Module) -> nn.Module:
    """The same module, its class changed in place. Raises OptionError for classes no protocol is written for."""
    if type(module) not in KINDS:
        known = ", ".join(kind.__name__ for kind in KINDS)
        raise OptionError(f"a {type(module).__name__} cannot serve as a backbone of its own; known are {known}")
    return change_class(module, KINDS[type(module)])
