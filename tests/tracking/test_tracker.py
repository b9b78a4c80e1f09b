"""The state machine, its refusals, results on disk, and the command line."""

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from heads.mlp_anchor_free import TrackOutput
from tasks.tracking.metrics import overlap
from tasks.tracking.model import JointTracker
from tasks.tracking.predict import open_film, track_film, track_set
from tasks.tracking.sequences import TrackSequence, xywh, xyxy
from tasks.tracking.tracker import Tracker, folded, follow
from tools.predict import main as predict_main
from tools.track import main
from zoo.adapters.inject import attachments
from zoo.errors import OptionError, UnknownNameError, ZooError

CONFIG = dict(
    type="JointTracker",
    backbone=dict(
        **dict(type="JointViT", name="vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1),
        **dict(num_heads=2, template_size=(16, 16), search_size=(32, 32)),
    ),
    head=dict(type="MLPAnchorFreeHead"),
    adapter=dict(type="LoRA", rank=2, init="both_normal"),
    preprocessing=dict(mean=(0.0,) * 3, std=(1.0,) * 3),
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return zoo.create(CONFIG)


class BrightestCell(torch.nn.Module):
    """Stands where a trained network would: scores every cell by its brightness, boxes as large as the template's."""

    def __init__(self, like):
        super().__init__()
        self.window = like.window

    def forward(self, search):
        cells = torch.nn.functional.avg_pool2d(search.mean(1), 8)
        height, width = cells.shape[1:]
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        centre = torch.stack((x / width, y / height), -1)
        boxes = torch.cat((centre - 0.125, centre + 0.125), -1).expand(len(cells), -1, -1, -1)
        return TrackOutput(cells * 40 - 4, boxes)

    predict = zoo.registry.HEADS.get("MLPAnchorFreeHead").predict


class SearchCrop(torch.nn.Module):
    template_size, search_size, search_grid, template_grid, stride = (16, 16), (32, 32), (4, 4), (2, 2), (8, 8)

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.token_type_embed = torch.nn.Parameter(torch.zeros(3, 1))
        self.pretrained_cfg = dict(mean=(0.0,) * 3, std=(1.0,) * 3)
        self.given = []

    def forward(self, search, template=None, mask=None):
        self.given.append((search, template, mask))
        return search * self.scale


def seeing():
    """A tracker model that really finds a bright square on black."""
    backbone = SearchCrop()
    return JointTracker(backbone, BrightestCell(type("Like", (), {"window": 0.1})))


def film(steps=12, side=10, size=(60, 80)):
    frames, boxes = np.zeros((steps, *size, 3), np.uint8), np.zeros((steps, 4))
    for i in range(steps):
        x, y = 10 + 4 * i, 10 + 2 * i
        frames[i, y : y + side, x : x + side] = 255
        boxes[i] = x, y, x + side, y + side
    return TrackSequence("square", frames, boxes)


def test_it_follows_what_its_network_sees():
    sequence = film()
    track = follow(seeing(), sequence)
    assert track.boxes.shape == (12, 4) and track.scores[0] == 1 and (track.scores > 0.5).all() and not track.stopped
    # cells are as large as the square, so a box may lie half a cell off in both directions: overlap 1 / 7
    assert overlap(xywh(track.boxes), xywh(sequence.boxes)).min() > 1 / 7
    still = overlap(xywh(np.repeat(sequence.boxes[:1], 12, 0)), xywh(sequence.boxes))
    assert overlap(xywh(track.boxes), xywh(sequence.boxes)).mean() > 3 * still.mean()


def test_the_template_is_cut_once_and_the_search_crop_follows_the_state():
    model = seeing()
    follow(model, film(4))
    searches, templates, masks = zip(*model.backbone.given, strict=True)
    assert all(template is templates[0] for template in templates) and masks[0].shape == (1, 2, 2)
    assert not torch.equal(searches[0], searches[2])
    assert templates[0].shape == (1, 3, 16, 16) and searches[0].shape == (1, 3, 32, 32)


def test_the_state_never_leaves_the_frame_and_survives_empty_boxes(model):
    tracker = Tracker(model)
    rng = np.random.default_rng(0)
    tracker.init(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8), (45, 35, 70, 60))  # hangs over the corner
    for _ in range(5):
        box, score = tracker.update(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
        assert (box >= 0).all() and (box <= [50, 40, 50, 40]).all() and 0 <= score <= 1
        assert (tracker.box[2:] > tracker.box[:2]).all()


def test_merged_gives_the_same_track_and_comes_apart_again(model):
    sequence = film(4)
    plain = follow(model, sequence)
    with folded(model):
        assert all(attached.merged for attached in attachments(model).values())
        merged = follow(model, sequence)
    np.testing.assert_allclose(merged.boxes, plain.boxes, atol=1e-4)
    assert not any(attached.merged for attached in attachments(model).values())
    whole = model([sequence], mode="predict")[0]
    np.testing.assert_array_equal(whole.boxes, merged.boxes)
    with pytest.raises(OptionError, match="mode 'predict', got 'loss'"):
        model([sequence], mode="loss")


def test_tracking_leaves_the_mode_of_the_model(model):
    model.train()
    follow(model, film(2))
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    "box,match",
    [
        ((1, 2, 3), "four finite numbers"),
        ((1, 2, 3, float("nan")), "four finite numbers"),
        (("a", 2, 3, 4), "four finite numbers"),
        ((10, 10, 10, 20), r"\(10, 10, 10, 20\) is empty"),
        ((10, 10, 5, 20), "is empty"),
        ((90, 10, 99, 20), "outside the frame, which is 80x60"),
    ],
)
def test_bad_boxes(model, box, match):
    with pytest.raises(OptionError, match=match):
        Tracker(model).init(np.zeros((60, 80, 3), np.uint8), box)


def test_bad_frames(model):
    tracker = Tracker(model)
    with pytest.raises(ZooError, match=r"call init\(frame, box\) first"):
        tracker.update(np.zeros((60, 80, 3), np.uint8))
    tracker.init(np.zeros((60, 80, 3), np.uint8), (1, 1, 9, 9))
    with pytest.raises(ZooError, match="frame 1 is 40x30, the first one was 80x60"):
        tracker.update(np.zeros((30, 40, 3), np.uint8))
    for frame in (np.zeros((60, 80), np.uint8), np.zeros((60, 80, 3)), [[1]]):
        with pytest.raises(ZooError, match=r"\(H, W, 3\) uint8 array, got"):
            tracker.update(frame)


def test_sequences_check_their_parts():
    frames = np.zeros((3, 4, 4, 3), np.uint8)
    with pytest.raises(ZooError, match=r"3 frames, but boxes of shape \(2, 4\)"):
        TrackSequence("a", frames, np.zeros((2, 4)))
    with pytest.raises(ZooError, match="2 entries of `visible`"):
        TrackSequence("a", frames, np.zeros((3, 4)), np.ones(2, bool))
    with pytest.raises(ZooError, match="has no frames"):
        TrackSequence("a", frames[:0], np.zeros((0, 4)))


@pytest.fixture
def folder(tmp_path):
    """Six frames as files and the truth beside them."""
    sequence = film(6)
    for i in range(6):
        (tmp_path / "square").mkdir(exist_ok=True)
        Image.fromarray(sequence.frames[i]).save(tmp_path / "square" / f"{i + 1}.png")
    (tmp_path / "square" / "groundtruth.txt").write_text("10,10,10,10\n" * 6)
    return tmp_path / "square"


def test_results_of_a_folder(model, folder, tmp_path):
    sequence = open_film(folder, None)
    track = track_film(model, sequence, tmp_path / "out")
    lines = (tmp_path / "out" / "square.txt").read_text().splitlines()
    np.testing.assert_allclose(np.loadtxt(lines, delimiter=","), xywh(track.boxes), atol=1e-4)
    assert lines[0] == "10.0000,10.0000,10.0000,10.0000"
    scores = np.loadtxt(tmp_path / "out" / "square_scores.txt")
    np.testing.assert_allclose(scores, track.scores, atol=1e-6)
    with Image.open(tmp_path / "out" / "square.png") as sheet:
        assert sheet.size == (4 * 240, 2 * 180)
    video = open_film(tmp_path / "out" / "square.mp4", (10, 10, 10, 10))
    assert len(video.frames) == 6 and video.frames[5].shape == (60, 80, 3)
    assert not list((tmp_path / "out").glob(".*"))


def test_a_film_of_another_kind(tmp_path, folder):
    with pytest.raises(ZooError, match="neither a folder of frames nor a video"):
        open_film(tmp_path / "x.txt", None)
    with pytest.raises(ZooError, match="missing file"):
        open_film(tmp_path / "x.mp4", None)
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    with pytest.raises(ZooError, match="cannot be read as a video"):
        open_film(tmp_path / "bad.mp4", (1, 1, 2, 2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ZooError, match="holds no images"):
        open_film(tmp_path / "empty", None)
    (folder / "groundtruth.txt").unlink()
    with pytest.raises(OptionError, match="--box x,y,w,h"):
        open_film(folder, None)


def test_command_line(folder, tmp_path, capsys, model):
    zoo.save(model, tmp_path / "saved")
    start = [str(tmp_path / "saved"), str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*start, "--no-drawing"]) == 0
    assert "6 of 6 frames" in capsys.readouterr().out
    assert len((tmp_path / "out" / "square.txt").read_text().splitlines()) == 6
    (folder / "4.png").write_bytes(b"torn")
    assert main([*start, "--box", "10,10,10,10"]) == 1
    told = capsys.readouterr()
    assert "3 of 6 frames" in told.out and "unreadable image" in told.err and "4.png" in told.err
    assert len((tmp_path / "out" / "square.txt").read_text().splitlines()) == 3
    assert (tmp_path / "out" / "square.mp4").is_file()
    assert main([*start, "--box", "10,10"]) == 2 and "--box is x,y,w,h" in capsys.readouterr().err
    assert main([*start, "--box", "500,10,4,4"]) == 2 and "outside the frame" in capsys.readouterr().err
    films = ["--dataset", "type=ComposedTracks", "count=2", "length=3", "size=48", "--style", "got10k"]
    assert main([start[0], *films, "--out", str(tmp_path / "set"), "--device", "cpu"]) == 0
    assert (tmp_path / "set" / "train_0001" / "train_0001_001.txt").is_file()
    assert main([start[0], "--out", "x"]) == 2 and "either a film or --dataset" in capsys.readouterr().err


def test_predict_takes_folders_that_know_their_object(folder, tmp_path, capsys, model):
    zoo.save(model, tmp_path / "saved")
    start = [str(tmp_path / "saved"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert predict_main([*start[:1], str(folder), str(tmp_path / "x.mp4"), *start[1:]]) == 0
    told = capsys.readouterr()
    assert "1 predictions, 1 skipped" in told.out and "missing file" in told.err
    assert (tmp_path / "out" / "square.txt").is_file()
    assert predict_main([*start[:1], str(tmp_path / "x.mp4"), *start[1:]]) == 2
    assert "tools/track.py takes a box" in capsys.readouterr().err


def test_ctrl_c_keeps_the_results_so_far(model, folder, tmp_path, monkeypatch, capsys):
    zoo.save(model, tmp_path / "saved")
    calls, original = [], Tracker.update

    def stopped(self, frame):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, frame)

    monkeypatch.setattr(Tracker, "update", stopped)
    code = main([str(tmp_path / "saved"), str(folder), "--out", str(tmp_path / "out"), "--no-drawing"])
    assert code == 130 and "the results so far" in capsys.readouterr().err
    assert len((tmp_path / "out" / "square.txt").read_text().splitlines()) == 3


def test_results_of_a_set(model, tmp_path):
    sequences = [film(3), TrackSequence("other", film(3).frames, film(3).boxes[:1])]
    told = []
    assert track_set(model, sequences, tmp_path, style="got10k", origin=1, tell=told.append) == []
    rows = np.loadtxt(tmp_path / "square" / "square_001.txt", delimiter=",")
    assert rows[0].tolist() == [11, 11, 10, 10] and rows.shape == (3, 4)
    assert np.loadtxt(tmp_path / "other" / "other_time.txt").shape == (3,) and len(told) == 2
    assert track_set(model, sequences, tmp_path, style="got10k", tell=told.append) == [] and len(told) == 2
    with pytest.raises(UnknownNameError, match="did you mean 'got10k'"):
        track_set(model, sequences, tmp_path, style="got-10k")


def test_a_torn_film_of_a_set_is_told_and_done_again(model, tmp_path):
    class Torn:
        def __len__(self):
            return 3

        def __getitem__(self, number):
            if number == 2:
                raise ZooError("missing file 3.jpg")
            return np.zeros((20, 20, 3), np.uint8)

    torn = TrackSequence("torn", Torn(), xyxy(np.array([[2.0, 2, 5, 5]])))
    outside = TrackSequence("outside", film(2).frames, xyxy(np.array([[200.0, 2, 5, 5]])))
    troubles = track_set(model, [outside, film(2)], tmp_path, tell=lambda line: None)
    assert len(troubles) == 1 and "outside the frame" in troubles[0] and (tmp_path / "square.txt").exists()
    for _ in range(2):
        assert track_set(model, [torn], tmp_path, tell=lambda line: None) == ["torn: missing file 3.jpg"]
    assert len((tmp_path / "torn.partial.txt").read_text().splitlines()) == 2
    assert not (tmp_path / "torn.txt").exists()
