"""The tables behind `find_sites`: which attribute names and classes play which role, how fused weights are laid out.

Everything here is data plus the few functions that read a layout off a module. A model needs an entry only if it
departs from the common habits: attribute names such as `qkv`, `proj`, `fc1`, blocks in lists called `blocks`, and fused
weights whose q, k and v rows are contiguous and of equal size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from zoo.adapters.base import Part

ROLES = (
    "q", "k", "v", "qkv", "qk", "kv", "out", "fc1", "fc2", "conv", "deconv", "linear", "norm", "embed", "head",
    "block", "attn", "mlp",
)  # fmt: skip
PROJECTIONS = ("q", "k", "v")
FUSED = frozenset({"qkv", "qk", "kv"})
MODULE_ROLES = frozenset({"block", "attn", "mlp"})  # roles of whole submodules, which own no adapted weight

# A module with one of these children is an attention module.
INPUT_NAMES: Mapping[str, str] = {
    "qkv": "qkv", "qkvs": "qkv", "qkv_proj": "qkv", "to_qkv": "qkv", "kv": "kv", "to_kv": "kv", "qk": "qk",
    "q": "q", "q_proj": "q", "query": "q", "query_proj": "q", "to_q": "q", "to_query": "q", "wq": "q",
    "k": "k", "k_proj": "k", "key": "k", "key_proj": "k", "to_k": "k", "to_key": "k", "wk": "k",
    "v": "v", "v_proj": "v", "value": "v", "value_proj": "v", "to_v": "v", "to_value": "v", "wv": "v",
}  # fmt: skip
OUTPUT_NAMES = frozenset({"proj", "out_proj", "o_proj", "c_proj", "output", "to_out", "wo"})

# First and last projections of a feed-forward module. It needs one of each; gated ones have several first projections.
FIRST_NAMES = frozenset({"fc1", "fc1_g", "fc1_x", "c_fc", "pw1", "ln1", "gate_proj", "up_proj", "pwconv1", "linear1"})
LAST_NAMES = frozenset({"fc2", "c_proj", "pw2", "ln2", "down_proj", "pwconv2", "linear2"})
GATED_NAMES = frozenset({"w0", "w1", "w2", "w3", "w12", "fc3"})  # told apart by their widths
MLP_ATTRIBUTES = frozenset({"mlp", "ffn", "feed_forward"})  # an nn.Sequential under such a name: fc1, activation, fc2
# Feed-forward modules that see something else than tokens: channel gates and position encodings.
NOT_MLP_CLASSES = ("Squeeze", "Excit", "SEModule", "Context", "SplitAttn", "Selective", "RelPos")
NOT_MLP_ATTRIBUTES = frozenset({"se", "meta_mlp", "cpb_mlp", "rel_pos", "rel_pos_mlp", "pos_embed", "time_mlp"})

# Lists whose elements are blocks (or stages that hold such a list themselves).
BLOCK_LISTS = frozenset(
    {"blocks", "resblocks", "layers", "layer", "stages", "features", "network", "transformer", "transformer_encoder"}
    | {"blocks_token_only", "cls_attn_blocks", "post_network", "fusion", "parallel_blocks"}
    | {f"{name}{i}" for name in ("layer", "stage", "block", "serial_blocks") for i in range(1, 5)}
)
NOT_BLOCKS = ("Embed", "Downsample", "Merg", "Stem", "Norm", "Conv2d", "Linear")
BLOCK_CLASSES = ("Block", "Bottleneck", "EncoderLayer", "DecoderLayer")  # only where no list is found
# A tower counts its blocks from zero: the deepest of these path components names it.
TOWERS = frozenset({"visual", "text", "text_decoder", "vision_model", "text_model", "trunk", "backbone", "neck"})
PATCH_NAMES = frozenset({"patch_embed", "patch_embeds"})
PATCH_CLASSES = ("PatchEmbed", "HybridEmbed", "FlexEmbeds")
HEADS = frozenset({"head", "heads", "head_dist", "aux_head", "classifier", "fc", "last_linear"})


def library_class(module: nn.Module) -> type:
    """The class of a module as its author wrote it: an adapter host is a subclass of a mixin of this package and it."""
    classes = type(module).__mro__
    own = [index for index, cls in enumerate(classes) if cls.__module__.startswith("zoo.adapters")]
    return classes[own[-1] + 1] if own else classes[0]


def class_key(module: nn.Module) -> str:
    """`file.Class`, e.g. `levit.Attention`: the finest name that survives vendoring a model file."""
    cls = library_class(module)
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


@dataclass(frozen=True)
class Layout:
    """Rows of a fused weight: `heads` repetitions of consecutive runs, each a role and its width."""

    heads: int
    runs: tuple[tuple[str, int], ...]

    @property
    def rows(self) -> int:
        return self.heads * sum(width for _, width in self.runs)

    def parts(self) -> tuple[Part, ...]:
        rows: dict[str, list[tuple[int, int]]] = {role: [] for role, _ in self.runs}
        at = 0
        for _ in range(self.heads):
            for role, width in self.runs:
                rows[role].append((at, at + width))
                at += width
        return tuple(Part(role, merge_rows(ranges)) for role, ranges in rows.items())


def _uneven_heads(attention: Any) -> Layout:
    runs = (("q", attention.key_dim), ("k", attention.key_dim), ("v", attention.val_dim))
    return Layout(attention.num_heads, runs)


def _uneven_key_value(attention: Any) -> Layout:
    return Layout(attention.num_heads, _uneven_heads(attention).runs[1:])


def _one_uneven_head(attention: Any) -> Layout:
    return Layout(1, _uneven_heads(attention).runs)


def _maybe_head_first(attention: Any) -> Layout:
    heads, width = attention.num_heads, attention.dim_head
    return _even(heads, width) if attention.head_first else _even(1, heads * width)


def _head_by_head(attention: Any) -> Layout:
    return _even(attention.num_heads, attention.head_dim)


def _lite_mla(attention: Any) -> Layout:
    return _even(attention.qkv.conv.out_channels // (3 * attention.dim), attention.dim)


def _even(heads: int, width: int) -> Layout:
    return Layout(heads, (("q", width), ("k", width), ("v", width)))


def _halo(attention: Any) -> Layout:
    return Layout(attention.num_heads, (("k", attention.dim_head_qk), ("v", attention.dim_head_v)))


def _bottleneck(attention: Any) -> Layout:
    return Layout(1, (("q", attention.dim_out_qk), ("k", attention.dim_out_qk), ("v", attention.dim_out_v)))


def _lambda(attention: Any) -> Layout:
    return Layout(1, (("q", attention.num_heads * attention.dim_qk), ("k", attention.dim_qk), ("v", attention.dim_v)))


def _single_head(attention: Any) -> Layout:
    return Layout(1, (("q", attention.qk_dim), ("k", attention.qk_dim), ("v", attention.pdim)))


def _separable(attention: Any) -> Layout:
    return Layout(1, (("q", 1), ("k", attention.embed_dim), ("v", attention.embed_dim)))


def _global_query(attention: Any) -> Layout:
    width = attention.qkv.in_features
    return Layout(1, (("k", width), ("v", width))) if attention.use_global else _even(1, width)


def _parallel_scaling(block: Any) -> Layout:
    return Layout(1, tuple(zip(("fc1", "q", "k", "v"), block.in_split, strict=True)))


@dataclass(frozen=True)
class Fused:
    """Where a class keeps its fused weight and how its rows are laid out."""

    layout: Callable[[Any], Layout]
    child: str = ""  # "" where the attribute name is already in INPUT_NAMES


FUSED_CLASSES: Mapping[str, Fused] = {
    "levit.Attention": Fused(_uneven_heads),
    "levit.AttentionDownsample": Fused(_uneven_key_value),
    "tiny_vit.Attention": Fused(_uneven_heads),
    "efficientformer.Attention": Fused(_uneven_heads),
    "efficientvit_msra.CascadedGroupAttention": Fused(_one_uneven_head),
    "maxxvit.Attention2d": Fused(_maybe_head_first),
    "maxxvit.AttentionCl": Fused(_maybe_head_first),
    "attention2d.Attention2d": Fused(_maybe_head_first),
    "gcvit.WindowAttentionGlobal": Fused(_global_query),
    "efficientvit_mit.LiteMLA": Fused(_lite_mla),
    "halo_attn.HaloAttn": Fused(_halo),
    "bottleneck_attn.BottleneckAttn": Fused(_bottleneck),
    "lambda_layer.LambdaLayer": Fused(_lambda),
    "shvit.SHSA": Fused(_single_head),
    "mobilevit.LinearSelfAttention": Fused(_separable),
    "cpubone.ConvAttention": Fused(_head_by_head, "pwise"),
    "lowformer.ConvAttention": Fused(_head_by_head, "pwise"),
    "vision_transformer.ParallelScalingBlock": Fused(_parallel_scaling, "in_proj"),
    "vision_transformer.DiffParallelScalingBlock": Fused(_parallel_scaling, "in_proj"),
}

# Children whose role the general names do not tell: class -> child (a relative path) -> role.
SPECIAL: Mapping[str, Mapping[str, str]] = {
    "vision_transformer.ParallelScalingBlock": {"attn_out_proj": "out", "mlp_out_proj": "fc2", "out_proj": "out"},
    "vision_transformer.DiffParallelScalingBlock": {"out_proj": "out"},
    "transformer.TransformerEncoderLayer": {"linear1": "fc1", "linear2": "fc2"},
    "transformer.TransformerDecoderLayer": {"linear1": "fc1", "linear2": "fc2"},
    "transformer.VisionTransformer": {"conv1": "embed"},  # open_clip
    "vision_transformer.VisionTransformer": {"conv_proj": "embed"},  # torchvision
    "swin_transformer.SwinTransformer": {"features.0.0": "embed"},  # torchvision
    "convnext.CNBlock": {"block.3": "fc1", "block.5": "fc2"},  # torchvision
    "modeling_vit.ViTAttention": {"output.dense": "out"},
    "modeling_dinov2.Dinov2Attention": {"output.dense": "out"},
    "modeling_vit.ViTLayer": {"intermediate.dense": "fc1", "output.dense": "fc2"},
}

# Children that are read by someone else's forward instead of being called: a branch around them would never run.
BYPASSED: Mapping[str, tuple[str, ...]] = {
    "swin_transformer.ShiftedWindowAttention": ("qkv", "proj"),  # torchvision
    "swin_transformer.ShiftedWindowAttentionV2": ("qkv", "proj"),
    "modified_resnet.AttentionPool2d": ("q_proj", "k_proj", "v_proj", "c_proj"),  # open_clip
    "model.AttentionPool2d": ("q_proj", "k_proj", "v_proj", "c_proj"),  # the original CLIP package
    # torch's fused kernel in evaluation mode
    "transformer.TransformerEncoderLayer": ("linear1", "linear2", "norm1", "norm2", "self_attn", "self_attn.out_proj"),
}


def bypassed_children(module: nn.Module) -> tuple[str, ...]:
    """Children whose weight this module reads without calling them."""
    # timm's BEiT, EVA and Swin-V2 hand a bias of three parts and the bare qkv weight to F.linear.
    if getattr(module, "q_bias", None) is not None and not getattr(module, "qkv_bias_separate", False):
        return ("qkv",)
    # With widths of their own for keys or values there is no packed weight, which the attention host needs.
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is None:
        return ("out_proj",)
    return BYPASSED.get(class_key(module), ())


def fused_parts(owner: nn.Module, fused: str, rows: int) -> tuple[str, tuple[Part, ...]]:
    """Role and parts of a fused weight with `rows` rows in `owner`, named `fused` there.

    Where the layout is unknown the whole weight is one part.
    """
    entry = FUSED_CLASSES.get(class_key(owner))
    layout = Layout(1, tuple((role, rows // len(fused)) for role in fused))
    if entry is not None:
        try:
            layout = entry.layout(owner)
        except AttributeError:  # another author's class of the same name
            layout = Layout(0, ())
    if layout.rows != rows:
        return fused, (Part(fused, ((0, rows),)),)
    return "".join(role for role, _ in layout.runs if role in PROJECTIONS), layout.parts()


def merge_rows(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sorted half-open ranges with touching neighbours joined."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)
