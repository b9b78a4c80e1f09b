"""Where weights come from: a source text in, a local and verified file or folder out."""

from zoo.hub.hf import push_folder
from zoo.hub.packaged import PACKAGED, PackagedWeights, match_by_order, packaged_weights
from zoo.hub.resolve import fetch
from zoo.hub.sources import Scheme, Source
from zoo.hub.weights import content_hash, load_state_dict

__all__ = [
    "PACKAGED",
    "PackagedWeights",
    "Scheme",
    "Source",
    "content_hash",
    "fetch",
    "load_state_dict",
    "match_by_order",
    "packaged_weights",
    "push_folder",
]
