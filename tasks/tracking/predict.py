"""Tracking in films and data sets: text results in the public formats, and a film with the boxes drawn."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from tasks.tracking.crops import Box, Image
from tasks.tracking.model import JointTracker
from tasks.tracking.readers import image_files, read_boxes
from tasks.tracking.sequences import FrameFiles, Frames, TrackSequence, xywh, xyxy
from tasks.tracking.tracker import Track, folded, follow
from zoo.engine.state import write_atomically
from zoo.errors import OptionError, UnknownNameError, ZooError, nearest

STYLES = ("plain", "got10k")
VIDEO_SUFFIXES = frozenset({".avi", ".mp4", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".m4v"})
COLUMNS, ROWS, WIDTH = 4, 3, 240
_COLOUR = (255, 196, 0)


class VideoFrames:
    """Frames of a video file, decoded one after another.

    Raises:
        ZooError: the file cannot be opened; while reading, a frame that is not there.
    """

    def __init__(self, path: Path) -> None:
        import cv2

        self.path, self._next = path, 0
        self._capture = cv2.VideoCapture(str(path))
        self._count = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)) if self._capture.isOpened() else 0
        self.rate = float(self._capture.get(cv2.CAP_PROP_FPS)) or 25.0
        if self._count <= 0:
            raise ZooError(f"{path} cannot be read as a video, or has no frames")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int, /) -> Image:
        import cv2

        if number != self._next:
            self._capture.set(cv2.CAP_PROP_POS_FRAMES, number)
        good, frame = self._capture.read()
        self._next = number + 1
        if not good:
            raise ZooError(f"{self.path} says it has {self._count} frames, but frame {number} cannot be read")
        return np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8)


class Drawing:
    """Collects frames with their boxes: a film (`.mp4`) and a sheet of twelve of them (`.png`)."""

    def __init__(self, film: Path, sheet: Path, total: int, rate: float) -> None:
        self.film, self.sheet, self.rate = film, sheet, rate
        self._shown = set(np.linspace(0, total - 1, min(total, COLUMNS * ROWS)).round().astype(int).tolist())
        self._small: list[Pillow.Image] = []
        self._writer: object = None
        self._part = film.with_name(f".{film.stem}.{os.getpid()}{film.suffix}")  # cv2 chooses the format by suffix

    def add(self, number: int, frame: Image, box: Box, score: float) -> None:
        """Draw one frame."""
        import cv2

        picture = drawn(frame, box, f"{number}  {score:.2f}")
        if self._writer is None:
            self.film.parent.mkdir(parents=True, exist_ok=True)
            size = (frame.shape[1], frame.shape[0])
            self._writer = cv2.VideoWriter(str(self._part), cv2.VideoWriter.fourcc(*"mp4v"), self.rate, size)
            if not self._writer.isOpened():
                raise ZooError(f"{self.film} cannot be written: no mp4 encoder in this OpenCV, or no access")
        self._writer.write(cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2BGR))  # type: ignore[attr-defined]
        if number in self._shown:
            self._small.append(picture.resize((WIDTH, max(1, round(WIDTH * frame.shape[0] / frame.shape[1])))))

    def close(self) -> None:
        """Finish both files; what was drawn so far is kept."""
        if self._writer is None:
            return
        self._writer.release()  # type: ignore[attr-defined]
        os.replace(self._part, self.film)
        height = self._small[0].height
        rows = -(-len(self._small) // COLUMNS)
        sheet = Pillow.new("RGB", (min(len(self._small), COLUMNS) * WIDTH, rows * height), "white")
        for place, picture in enumerate(self._small):
            sheet.paste(picture, (place % COLUMNS * WIDTH, place // COLUMNS * height))
        write_atomically(self.sheet, lambda file: sheet.save(file, format="PNG"))


def open_film(path: Path, box: ArrayLike | None) -> TrackSequence:
    """A folder of frames or a video as a sequence; box is x, y, width, height in its first frame.

    Without a box, a folder's `groundtruth.txt` or `groundtruth_rect.txt` gives it.

    Raises:
        ZooError: nothing readable there. OptionError: no box.
    """
    frames: Frames
    if path.is_dir():
        files = image_files(path) or image_files(path / "img") or image_files(path / "imgs")
        if not files:
            raise ZooError(f"the folder {path} holds no images")
        frames = FrameFiles(files)
    elif path.suffix.lower() in VIDEO_SUFFIXES:
        if not path.is_file():
            raise ZooError(f"missing file {path}")
        frames = VideoFrames(path)
    else:
        raise ZooError(f"{path} is neither a folder of frames nor a video ({', '.join(sorted(VIDEO_SUFFIXES))})")
    if box is None:
        truth = [path / name for name in ("groundtruth.txt", "groundtruth_rect.txt") if (path / name).is_file()]
        if not truth:
            raise OptionError(f"say with --box x,y,w,h where the object is in the first frame of {path}")
        return TrackSequence(path.stem, frames, read_boxes(truth[0])[:1])
    return TrackSequence(path.stem, frames, xyxy(np.asarray(box, float))[None])


def predict_files(model: JointTracker, inputs: Sequence[Path], out: Path) -> dict[str, Any]:
    """Track every folder of frames that holds its own `groundtruth.txt`; what `tools/predict.py` calls.

    Returns `predictions` (path, frames, and `stopped` where it ended early) and `skipped` (path, reason).

    Raises:
        ZooError: nothing could be tracked; for other films give a box to `tools/track.py`.
    """
    done: dict[str, Any] = {"predictions": [], "skipped": []}
    for path in inputs:
        try:
            track = track_film(model, open_film(path, None), out)
        except ZooError as error:
            done["skipped"].append({"path": str(path), "reason": str(error)})
            continue
        done["predictions"].append({"path": str(path), "frames": len(track.boxes), "stopped": track.stopped})
        if track.interrupted:
            raise KeyboardInterrupt
    if not done["predictions"]:
        reasons = "\n  ".join(item["reason"] for item in done["skipped"])
        raise ZooError(f"none of the {len(inputs)} inputs could be tracked (tools/track.py takes a box)\n  {reasons}")
    return done


def track_film(model: JointTracker, sequence: TrackSequence, out: Path, *, draw: bool = True) -> Track:
    """Track one film; writes `NAME.txt` (x,y,w,h a frame), `NAME_scores.txt`, and with draw `NAME.mp4`, `NAME.png`.

    A frame that cannot be used, or Ctrl-C, ends the track: the results so far are written, `Track.stopped` says why.
    """
    rate = sequence.frames.rate if isinstance(sequence.frames, VideoFrames) else 25.0
    drawing = None
    if draw:
        film, sheet = (out / f"{sequence.name}.{suffix}" for suffix in ("mp4", "png"))
        drawing = Drawing(film, sheet, len(sequence.frames), rate)
    try:
        with folded(model):
            track = follow(model, sequence, keep_going=True, watch=drawing.add if drawing else None)
    finally:
        if drawing:
            drawing.close()
    _write_lines(out / f"{sequence.name}.txt", xywh(track.boxes), "%.4f")
    _write_lines(out / f"{sequence.name}_scores.txt", track.scores[:, None], "%.6f")
    return track


def track_set(
    model: JointTracker,
    sequences: Sequence[TrackSequence],
    out: Path,
    *,
    style: str = "plain",
    origin: int = 0,
    tell: Callable[[str], None] = print,
) -> list[str]:
    """Track a data set for a benchmark's server; sequences whose results are there already are left alone.

    Args:
        style: "plain" writes `NAME.txt`, "got10k" `NAME/NAME_001.txt` and `NAME/NAME_time.txt`.
        origin: number of the first pixel in the results; 1 for LaSOT.
        tell: called with a line for every sequence.

    Returns:
        What went wrong, a line each; those sequences have their results so far, if any, in `NAME.partial.txt`.
    """
    if style not in STYLES:
        raise UnknownNameError(f"no result style is called {style!r}; {nearest(style, STYLES)}")
    troubles = []
    for number, sequence in enumerate(sequences, 1):
        folder = out / sequence.name if style == "got10k" else out
        stem = f"{sequence.name}_001" if style == "got10k" else sequence.name
        if (folder / f"{stem}.txt").is_file():
            continue
        try:
            with folded(model):
                track = follow(model, sequence, keep_going=True)
        except ZooError as error:  # not even its first frame
            troubles.append(f"{sequence.name}: {error}")
            continue
        name = f"{stem}.partial.txt" if track.stopped else f"{stem}.txt"
        if style == "got10k":
            _write_lines(folder / f"{sequence.name}_time.txt", track.seconds[:, None], "%.6f")
        _write_lines(folder / name, xywh(track.boxes + origin), "%.4f")
        if track.interrupted:
            raise KeyboardInterrupt
        if track.stopped:
            troubles.append(f"{sequence.name}: {track.stopped}")
        rate = len(track.seconds) / max(float(track.seconds.sum()), 1e-9)
        tell(f"{number}/{len(sequences)} {sequence.name}: {len(track.boxes)} frames, {rate:.1f} a second")
    return troubles


def drawn(frame: Image, box: Box, text: str) -> Pillow.Image:
    """The frame with the box and a few words."""
    picture = Pillow.fromarray(frame)
    draw = ImageDraw.Draw(picture)
    thick = max(1, round(min(frame.shape[:2]) / 160))
    draw.rectangle(tuple(box.tolist()), outline=_COLOUR, width=thick)
    font = ImageFont.load_default(max(10, round(min(frame.shape[:2]) / 24)))
    place = draw.textbbox((4, 4), text, font)
    draw.rectangle((0, 0, place[2] + 4, place[3] + 4), fill=(20, 24, 32))
    draw.text((4, 4), text, fill=_COLOUR, font=font)
    return picture


def _write_lines(path: Path, rows: NDArray[np.float64], pattern: str) -> None:
    text = "".join(",".join(pattern % value for value in row) + "\n" for row in rows)
    write_atomically(path, lambda file: file.write(text.encode()))
