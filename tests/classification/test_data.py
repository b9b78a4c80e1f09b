"""Data sets: what they find, how they split, and that everything wrong is told at once."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from tasks.classification.data import CSVDataset, EmbeddedDataset, ImageFolderDataset, VTABDataset, stratified_split
from tasks.classification.images import read_image
from zoo.errors import OptionError, UnknownNameError, ZooError
from zoo.registry import DATASETS

SMALL = {"type": "EvalTransform", "size": 16, "crop_pct": 1.0}


def picture(path, value=100, size=(20, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("cat", "dog", "owl")):
        for i in range(4):
            picture(tmp_path / name / ("deep" if i == 3 else "") / f"{i}.png", 50 * number)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    return tmp_path


def test_folders(folder):
    data = DATASETS.create({"type": "ImageFolderDataset", "root": folder, "transform": SMALL})
    assert data.metainfo["classes"] == ("cat", "dog", "owl") and len(data) == 12
    sample = data[5]
    assert sample["inputs"].shape == (3, 16, 16) and sample["inputs"].dtype == torch.uint8
    assert sample["inputs"][0].unique().tolist() == [50]
    assert sample["data_samples"] == {"label": 1, "index": 5, "path": str(folder / "dog" / "1.png")}


def test_given_classes_fix_the_numbering(folder):
    data = ImageFolderDataset(folder, classes=["owl", "dog", "cat"], transform=SMALL)
    assert data[0]["data_samples"]["path"].endswith("owl/0.png") and data.labels == [0] * 4 + [1] * 4 + [2] * 4


def test_all_problems_come_at_once(folder):
    (folder / "cat" / "0.png").write_bytes(b"not a picture")
    whole = picture(folder / "dog" / "big.png", size=(400, 400)).read_bytes()
    (folder / "dog" / "0.png").write_bytes(whole[: len(whole) // 2])  # the header is fine, the pixels end early
    (folder / "owls").mkdir()
    (folder / "owls" / "broken.txt").write_text("")
    with pytest.raises(ZooError) as caught:
        ImageFolderDataset(folder, classes=["cat", "dog", "owl", "yak"])
    text = str(caught.value)
    assert "4 problem(s)" in text
    assert f"unreadable image {folder / 'cat' / '0.png'}" in text
    assert f"unreadable image {folder / 'dog' / '0.png'}" in text
    assert "folder 'owls' is no known class; did you mean 'owl'?" in text
    assert "class 'yak' has no images" in text


def test_large_sets_have_their_headers_read_only(folder):
    whole = picture(folder / "dog" / "0.png", size=(400, 400)).read_bytes()
    (folder / "dog" / "0.png").write_bytes(whole[: len(whole) // 2])
    data = ImageFolderDataset(folder, decode_up_to=5, transform=SMALL)
    with pytest.raises(ZooError, match=r"unreadable image .*dog"):  # then the sample itself names the file
        [data[i] for i in range(len(data))]
    (folder / "dog" / "1.png").write_bytes(b"")
    with pytest.raises(ZooError, match="1 problem"):
        ImageFolderDataset(folder, decode_up_to=5)


def test_nothing_to_train_on_is_an_error(tmp_path):
    with pytest.raises(ZooError, match="no images at all"):
        ImageFolderDataset(tmp_path)
    with pytest.raises(ZooError, match="does not exist"):
        ImageFolderDataset(tmp_path / "nowhere")
    with pytest.raises(ZooError, match="no images at all"):
        EmbeddedDataset("digits", split="none", fractions={"all": 1.0, "none": 0.0})


def test_empty_classes_may_be_accepted(folder):
    data = ImageFolderDataset(folder, classes=["cat", "dog", "owl", "yak"], allow_empty_classes=True)
    assert len(data.metainfo["classes"]) == 4


def test_table(tmp_path):
    for i in range(4):
        picture(tmp_path / "images" / f"{i}.png", i)
    table = tmp_path / "train.csv"
    table.write_text("path,label\nimages/0.png,10\nimages/1.png,9\nimages/2.png,10\nimages/3.png,2\n")
    data = CSVDataset(table, transform=SMALL)
    assert data.metainfo["classes"] == ("2", "9", "10")  # by value, not by spelling
    assert data.labels == [2, 1, 2, 0]
    table.write_text("label,path\ncat,images/0.png\ndgo,images/1.png\ncat,\ncat,images/9.png\n")
    with pytest.raises(ZooError) as caught:
        CSVDataset(table, classes=["cat", "dog"])
    text = str(caught.value)
    assert "4 problem(s)" in text and "line 3: unknown label 'dgo'; did you mean 'dog'?" in text
    assert "line 4: no path" in text and "missing file" in text and "class 'dog' has no images" in text
    table.write_text("file,label\n")
    with pytest.raises(ZooError, match="no column path; the header is"):
        CSVDataset(table)


def test_vtab_lists(tmp_path):
    for i in range(6):
        picture(tmp_path / "images" / f"{i}.png", i)
    (tmp_path / "train800.txt").write_text("images/0.png 0\nimages/1.png 2\nimages/2.png 1\n")
    (tmp_path / "val200.txt").write_text("images/3.png 2\n")
    (tmp_path / "train800val200.txt").write_text("".join(f"images/{i}.png {i % 3}\n" for i in range(4)))
    train, val = (VTABDataset(tmp_path, lists=name, transform=SMALL) for name in ("train800", "val200"))
    assert train.labels == [0, 2, 1] and val.labels == [2]
    assert train.metainfo == val.metainfo == {"classes": ("0", "1", "2")}
    with pytest.raises(ZooError, match=r"the list .*test\.txt does not exist"):
        VTABDataset(tmp_path, lists="test")
    (tmp_path / "test.txt").write_text("images/5.png 1\nimages/7.png 1\nno-label\n")
    with pytest.raises(ZooError) as caught:
        VTABDataset(tmp_path, lists="test")
    assert "2 problem(s)" in str(caught.value)
    assert "test line 3: expected `path label`, got 'no-label'" in str(caught.value)
    with pytest.raises(UnknownNameError, match="did you mean 'train800'"):
        VTABDataset(tmp_path, lists="train80")


@pytest.mark.parametrize(("name", "size", "side"), [("digits", 1797, 8), ("mnist5k", 5000, 28)])
def test_embedded_sets_are_split_without_overlap(name, size, side):
    parts = [EmbeddedDataset(name, split=split, transform=SMALL) for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == size
    images = Counter(item.image.tobytes() for part in parts for item in part.items)
    assert max(images.values()) == 1  # no image is in two parts
    for part, share in zip(parts, (0.6, 0.2, 0.2), strict=True):
        counts = Counter(part.labels)
        assert sorted(counts) == list(range(10)) and part.items[0].image.shape == (side, side, 3)
        assert all(abs(counts[k] / len(part) - 0.1) < 0.01 for k in counts)
        assert abs(len(part) - share * size) < 10
    again = EmbeddedDataset(name, split="val", transform=SMALL)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(parts[1].items, again.items, strict=True))


def test_digits_are_the_ones_of_scikit_learn():
    from sklearn.datasets import load_digits

    whole = EmbeddedDataset("digits", split="all", fractions={"all": 1.0}, transform=SMALL)
    original = load_digits()
    ours = Counter((item.image[..., 0].tobytes(), item.label) for item in whole.items)
    images = np.rint(original.images * 255 / 16).astype(np.uint8)
    assert ours == Counter(
        (image.tobytes(), label) for image, label in zip(images, original.target.tolist(), strict=True)
    )


def test_limit_takes_the_same_few_of_each_class():
    few = EmbeddedDataset("digits", limit_per_class=3, transform=SMALL)
    more = EmbeddedDataset("digits", limit_per_class=5, transform=SMALL)
    assert Counter(few.labels) == dict.fromkeys(range(10), 3)
    assert {i.image.tobytes() for i in few.items} < {i.image.tobytes() for i in more.items}


def test_stratified_split_by_hand():
    labels = [0] * 10 + [1] * 5
    parts = stratified_split(labels, {"a": 0.6, "b": 0.4}, seed=1)
    assert {k: Counter(labels[i] for i in v) for k, v in parts.items()} == {"a": {0: 6, 1: 3}, "b": {0: 4, 1: 2}}
    assert sorted(parts["a"] + parts["b"]) == list(range(15))
    assert parts == stratified_split(labels, {"a": 0.6, "b": 0.4}, seed=1)
    assert parts != stratified_split(labels, {"a": 0.6, "b": 0.4}, seed=2)
    with pytest.raises(OptionError, match="sum to at most 1"):
        stratified_split(labels, {"a": 0.7, "b": 0.4})


def test_wrong_splits_and_names():
    with pytest.raises(OptionError, match="did you mean 'train'"):
        EmbeddedDataset("digits", split="trian")
    with pytest.raises(UnknownNameError, match="did you mean 'digits'"):
        EmbeddedDataset("digit")
    with pytest.raises(OptionError, match="limit_per_class"):
        EmbeddedDataset("digits", limit_per_class=0)


def test_split_of_files_needs_fractions(folder):
    with pytest.raises(OptionError, match="needs fractions"):
        ImageFolderDataset(folder, split="train")
    parts = [ImageFolderDataset(folder, split=s, fractions={"train": 0.75, "val": 0.25}) for s in ("train", "val")]
    assert [len(p) for p in parts] == [9, 3]


def test_orientation_and_depth_of_colour(tmp_path):
    upright = Image.new("RGB", (4, 2), "black")
    upright.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.save(tmp_path / "turned.png", exif=exif)
    turned = read_image(tmp_path / "turned.png")
    assert turned.shape == (4, 2, 3) and turned[0, 1, 0] == 255
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 128, 255]
    Image.new("L", (3, 3), 7).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").shape == (3, 3, 3)
    Image.new("RGBA", (3, 3), (9, 8, 7, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png")[0, 0].tolist() == [9, 8, 7]
    with pytest.raises(ZooError, match="missing file"):
        read_image(tmp_path / "none.png")
