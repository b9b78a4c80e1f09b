"""Every reader on a small written tree, with the special cases of its data set."""

import json

import numpy as np
import pytest
from PIL import Image

from tasks.tracking.coco import COCOTracks
from tasks.tracking.otb import OTB100
from tasks.tracking.readers import TNL2K, GOT10k, LaSOT, LaSOTExtension, TrackingNet, read_boxes
from zoo.errors import UnknownNameError, ZooError


def frames(folder, numbers, digits=8, size=(12, 10)):
    """Images whose grey level is their number, so that the right file is known by its content."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.new("L", size, number % 256).save(folder / f"{number:0{digits}d}.jpg", quality=100)


def level(sequence, number):
    return int(sequence.frames[number][5, 5, 0])


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def lasot_sequence(root, name, count=3):
    folder = root / name.rpartition("-")[0] / name
    frames(folder / "img", range(1, count + 1))
    write(folder / "groundtruth.txt", "".join(f"{i + 1},2,5,4\n" for i in range(count)))
    write(folder / "full_occlusion.txt", ",".join("0" * count))
    write(folder / "out_of_view.txt", ",".join("0" * (count - 1) + "1"))
    write(folder / "nlp.txt", "a red thing\n")
    return folder


def test_lasot(tmp_path):
    for name in ("bird-1", "bird-10", "boat-2"):
        lasot_sequence(tmp_path, name)
    write(tmp_path / "training_set.txt", "bird-10\nboat-2\n")
    write(tmp_path / "testing_set.txt", "bird-1\n")
    train = LaSOT(tmp_path, split="train")
    assert [s.name for s in train.sequences] == ["bird-10", "boat-2"]
    one = train[0]["inputs"]
    assert one.boxes.tolist() == [[i, 1, i + 5, 5] for i in range(3)]  # from 1 to 0
    assert one.visible.tolist() == [True, True, False] and one.text == "a red thing"
    assert one.usable().tolist() == [0, 1] and level(one, 2) == 3
    assert len(LaSOT(tmp_path, split="train", exclude=["boat-2"])) == 1
    assert LaSOT(tmp_path, split="test").sequences[0].name == "bird-1"
    with pytest.raises(UnknownNameError, match="no split 'tests'; did you mean 'test'"):
        LaSOT(tmp_path, split="tests")


def test_lasot_tells_all_problems_at_once(tmp_path):
    folder = lasot_sequence(tmp_path, "bird-1")
    (folder / "img" / "00000003.jpg").unlink()
    write(lasot_sequence(tmp_path, "bird-2") / "out_of_view.txt", "0,0")
    write(lasot_sequence(tmp_path, "bird-3") / "groundtruth.txt", "1,2,3,4\n1,2,x,4\n")
    write(tmp_path / "training_set.txt", "bird-1\nbird-2\nbird-3\nbird-4\n")
    with pytest.raises(ZooError) as caught:
        LaSOT(tmp_path, split="train")
    text = str(caught.value)
    assert "4 problem(s)" in text and "00000003.jpg does not exist" in text
    assert "visibility of [3, 2]" in text and "line 2: expected numbers, got '1,2,x,4'" in text
    assert "bird-4/groundtruth.txt does not exist" in text
    with pytest.raises(ZooError, match=r"testing_set.txt does not exist"):
        LaSOT(tmp_path, split="test")


def test_lasot_extension_is_not_shifted(tmp_path):
    for name in ("cat-10", "cat-2"):
        lasot_sequence(tmp_path, name)
    found = LaSOTExtension(tmp_path).sequences
    assert [s.name for s in found] == ["cat-2", "cat-10"]
    assert found[0].boxes[0].tolist() == [1, 2, 6, 6]


def test_got10k(tmp_path):
    folder = tmp_path / "train" / "GOT-10k_Train_000001"
    frames(folder, range(1, 5))
    write(folder / "groundtruth.txt", "1.5,2.0,4.0,3.0\n" * 4)
    write(folder / "cover.label", "8\n8\n0\n3\n")
    write(folder / "absence.label", "0\n1\n0\n0\n")
    write(tmp_path / "train" / "list.txt", "GOT-10k_Train_000001\n")
    one = GOT10k(tmp_path, split="train").sequences[0]
    assert one.visible.tolist() == [True, False, False, True] and one.cover.tolist() == [8, 8, 0, 3]
    assert one.boxes[0].tolist() == [1.5, 2, 5.5, 5] and one.annotated
    test = tmp_path / "test" / "GOT-10k_Test_000001"
    frames(test, range(1, 4))
    write(test / "groundtruth.txt", "1,2,4,3\n")
    write(tmp_path / "test" / "list.txt", "GOT-10k_Test_000001\n")
    one = GOT10k(tmp_path, split="test").sequences[0]
    assert len(one.frames) == 3 and one.boxes.shape == (1, 4) and not one.annotated
    with pytest.raises(ZooError, match="no sequences at all"):
        GOT10k(tmp_path, split="train", exclude=["GOT-10k_Train_000001"])


def test_trackingnet(tmp_path):
    for part, name in (("TRAIN_0", "a-1"), ("TRAIN_11", "b-2")):
        frames(tmp_path / part / "frames" / name, range(11), digits=1)
        write(tmp_path / part / "anno" / f"{name}.txt", "1.0,2.0,3.0,4.0\n" * 11)
    frames(tmp_path / "TEST" / "frames" / "c", range(11), digits=1)
    write(tmp_path / "TEST" / "anno" / "c.txt", "1,2,3,4\n")
    train = TrackingNet(tmp_path, split="train").sequences
    assert [s.name for s in train] == ["a-1", "b-2"] and level(train[0], 10) == 10
    test = TrackingNet(tmp_path, split="test").sequences[0]
    assert len(test.frames) == 11 and not test.annotated
    assert [level(test, i) for i in (2, 10)] == [2, 10]  # 10 comes after 2, not after 1


def test_tnl2k(tmp_path):
    frames(tmp_path / "film" / "imgs", (1, 2))
    write(tmp_path / "film" / "groundtruth.txt", "1,2,3,4\n0,0,0,0\n")
    write(tmp_path / "film" / "language.txt", "the ball")
    one = TNL2K(tmp_path).sequences[0]
    assert one.text == "the ball" and one.usable().tolist() == [0]


def otb_sequence(root, name, numbers, text, digits=4, suffix=""):
    frames(root / name / "img", numbers, digits)
    write(root / name / f"groundtruth_rect{suffix}.txt", text)


def test_otb_special_cases(tmp_path):
    line = "1,2,3,4\n"
    otb_sequence(tmp_path, "Basketball", range(1, 4), "1\t2\t3\t4\n5 6 7 8\n1, 2, 3, 4\n")
    otb_sequence(tmp_path, "Jogging", range(1, 3), line * 2, suffix=".1")
    otb_sequence(tmp_path, "Jogging", range(1, 3), "9,9,3,3\n" * 2, suffix=".2")
    otb_sequence(tmp_path, "Human4", range(1, 3), line * 2, suffix=".2")
    otb_sequence(tmp_path, "Board", range(1, 3), line * 2, digits=5)
    otb_sequence(tmp_path, "BlurCar3", range(3, 6), line * 3)
    otb_sequence(tmp_path, "David", range(300, 302), line * 2)
    otb_sequence(tmp_path, "Football1", (1, 74, 80), line * 80)
    otb_sequence(tmp_path, "Tiger1", range(1, 9), line * 8)
    found = {s.name: s for s in OTB100(tmp_path).sequences}
    assert list(found) == ["Basketball", "BlurCar3", "Board", "David", "Football1", "Human4.2", "Jogging.1",
                           "Jogging.2", "Tiger1"]  # fmt: skip
    assert found["Basketball"].boxes[1].tolist() == [5, 6, 12, 14]
    assert found["Jogging.2"].boxes[0].tolist() == [9, 9, 12, 12]
    assert level(found["BlurCar3"], 0) == 3 and level(found["David"], 0) == 300 % 256
    assert len(found["Football1"].frames) == 74 and level(found["Football1"], 73) == 74
    assert len(found["Tiger1"].frames) == 8 and level(found["Board"], 1) == 2
    short = {s.name: s for s in OTB100(tmp_path, skip_tiger1=True).sequences}["Tiger1"]
    assert len(short.frames) == len(short.boxes) == 3 and level(short, 0) == 6
    with pytest.raises(ZooError, match="no sequences at all"):
        OTB100(tmp_path / "nowhere")


def test_coco(tmp_path):
    frames(tmp_path / "train2017", (7, 9), digits=12)
    ones = [
        dict(image_id=9, bbox=[1, 2, 4, 3], iscrowd=0),
        dict(image_id=7, bbox=[0, 0, 9, 9], iscrowd=1),
        dict(image_id=7, bbox=[5, 5, 0, 3], iscrowd=0),
        dict(image_id=7, bbox=[2.5, 1, 3, 3], iscrowd=0),
    ]
    images = [dict(id=7, file_name="000000000007.jpg"), dict(id=9, file_name="000000000009.jpg")]
    write(tmp_path / "annotations" / "instances_train2017.json", json.dumps(dict(images=images, annotations=ones)))
    found = COCOTracks(tmp_path)
    assert len(found) == 2 and [level(s, 0) for s in found.sequences] == [9, 7]
    assert found[1]["inputs"].boxes.tolist() == [[2.5, 1, 5.5, 4]]
    assert [s.name for s in found.sequences[:1]] == ["000000000009_0"]
    write(tmp_path / "annotations" / "instances_val2017.json", "[]")
    with pytest.raises(ZooError, match=r"no folder .*val2017"):
        COCOTracks(tmp_path, split="val2017")
    (tmp_path / "val2017").mkdir()
    with pytest.raises(ZooError, match="not a file of COCO instances"):
        COCOTracks(tmp_path, split="val2017")


def test_numbers(tmp_path):
    file = tmp_path / "g.txt"
    write(file, "1,2,3,4\n\n5;6,7,8\n")
    with pytest.raises(ZooError, match="line 3: expected numbers"):
        read_boxes(file)
    write(file, "1,2,3\n")
    with pytest.raises(ZooError, match="line 1: expected 4 numbers, got 3"):
        read_boxes(file)
    write(file, "NaN,NaN,NaN,NaN\n")
    assert np.isnan(read_boxes(file)).all()
