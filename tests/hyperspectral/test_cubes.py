"""Reading cubes: every format gives back what was written, and what is wrong is said before anything trains."""

import sys

import numpy as np
import pytest
from scipy.io import savemat

from tasks.hyperspectral.cubes import Scene, check_scene, envi_fields, read_array, read_envi
from tasks.hyperspectral.scenes import PUBLISHED, load_scene, read_cube
from zoo.errors import OptionError, UnknownNameError, ZooError

CUBE = np.random.default_rng(0).random((5, 7, 11)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, 4, (5, 7))


def write_envi(folder, layout, code="4", kind="<f4", order=0, data=".img", extra=""):
    axes = {"bsq": (2, 0, 1), "bil": (0, 2, 1), "bip": (0, 1, 2)}[layout]
    (folder / f"x{data}").write_bytes(b"\0" * 3 + CUBE.transpose(axes).astype(kind).tobytes())
    (folder / "x.hdr").write_text(
        f"ENVI\ndescription = {{\n two lines = of text}}\nsamples = 7\nlines = 5\nbands = 11\nheader offset = 3\n"
        f"data type = {code}\ninterleave = {layout}\nbyte order = {order}\n{extra}"
    )
    return folder / "x.hdr"


@pytest.mark.parametrize("layout", ["bsq", "bil", "bip"])
@pytest.mark.parametrize(("kind", "order"), [("<f4", 0), (">f4", 1)])
def test_envi_layouts_and_byte_orders(tmp_path, layout, kind, order):
    waves = "wavelength = {" + ", ".join(str(0.4 + 0.1 * i) for i in range(11)) + "}\n"
    array, found = read_envi(write_envi(tmp_path, layout, kind=kind, order=order, extra=waves))
    np.testing.assert_array_equal(array, CUBE)
    assert isinstance(array.base, np.memmap) or isinstance(array, np.memmap)
    np.testing.assert_allclose(found, 400 + 100 * np.arange(11))


def test_envi_by_its_data_file_and_as_a_scene(tmp_path):
    write_envi(tmp_path, "bil")
    np.testing.assert_array_equal(read_array(tmp_path / "x.img"), CUBE)
    assert read_cube(tmp_path / "x.hdr").wavelengths is None


def test_envi_mistakes(tmp_path):
    header = write_envi(tmp_path, "bsq", code="6")
    with pytest.raises(ZooError, match="data type 6"):
        read_envi(header)
    write_envi(tmp_path, "bsq")
    (tmp_path / "x.img").write_bytes(b"short")
    with pytest.raises(ZooError, match=r"5 bytes, its header asks for 1543"):
        read_envi(header)
    (tmp_path / "x.img").unlink()
    with pytest.raises(ZooError, match="no data file beside"):
        read_envi(header)
    header.write_text("ENVI\nsamples = 3\n")
    with pytest.raises(ZooError, match="lacks the fields"):
        read_envi(header)
    header.write_text("samples = 3\n")
    with pytest.raises(ZooError, match="does not begin with ENVI"):
        envi_fields(header)


def test_mat_5_and_its_variables(tmp_path):
    path = tmp_path / "a.mat"
    savemat(path, {"cube": CUBE, "note": "text", "other": LABELS})
    np.testing.assert_array_equal(read_array(path), CUBE)
    np.testing.assert_array_equal(read_array(path, ndim=2, key="other"), LABELS)
    with pytest.raises(UnknownNameError, match="did you mean 'cube'"):
        read_array(path, "cub")
    savemat(path, {"a": CUBE, "b": CUBE})
    with pytest.raises(ZooError, match=r"2 arrays of 3 axes.*a \(5, 7, 11\)"):
        read_array(path)


def write_mat73(path):
    import h5py

    with h5py.File(path, "w", userblock_size=512) as file:
        file["cube"] = CUBE.T  # MATLAB's order
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64")


def test_mat_73(tmp_path):
    write_mat73(tmp_path / "new.mat")
    np.testing.assert_array_equal(read_array(tmp_path / "new.mat", "cube"), CUBE)
    with pytest.raises(UnknownNameError, match="no variable 'x'"):
        read_array(tmp_path / "new.mat", "x")


def test_mat_73_without_h5py_says_what_to_install(tmp_path, monkeypatch):
    write_mat73(tmp_path / "new.mat")
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ZooError, match="pip install h5py"):
        read_array(tmp_path / "new.mat")


def test_npy_is_memory_mapped_and_never_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", CUBE)
    assert isinstance(read_array(tmp_path / "a.npy"), np.memmap)
    np.save(tmp_path / "b.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(ZooError, match="unreadable"):
        read_array(tmp_path / "b.npy")


def test_files_that_are_no_cubes(tmp_path):
    with pytest.raises(ZooError, match="missing file"):
        read_array(tmp_path / "none.mat")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ZooError, match="cubes are read from"):
        read_array(tmp_path / "a.txt")
    (tmp_path / "torn.mat").write_bytes(b"MATLAB 5.0" + b"\1" * 300)
    with pytest.raises(ZooError):
        read_array(tmp_path / "torn.mat")
    np.save(tmp_path / "flat.npy", LABELS)
    with pytest.raises(ZooError, match="not a cube"):
        read_array(tmp_path / "flat.npy")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_scenes_by_their_file_and_variable_names(tmp_path, name):
    entry = PUBLISHED[name]
    savemat(tmp_path / entry.cube, {entry.cube_key: CUBE, "extra": CUBE})
    savemat(tmp_path / entry.labels, {entry.labels_key: LABELS.astype(np.uint8), "extra": LABELS})
    scene = load_scene(name, root=tmp_path)
    np.testing.assert_array_equal(scene.cube, CUBE)
    np.testing.assert_array_equal(scene.labels, LABELS)
    assert len(set(scene.classes)) >= len(scene.classes) - 1  # HanChuan names two classes alike in some lists
    assert {"salinas": 16, "pavia_university": 9, "honghu": 22, "longkou": 9, "qingyun": 6}.get(name, 1) <= len(
        scene.classes
    )


def test_scene_files_that_are_not_there_and_unknown_names(tmp_path):
    with pytest.raises(ZooError, match=r"needs PaviaU.mat and PaviaU_gt.mat in"):
        load_scene("pavia_university", root=tmp_path)
    with pytest.raises(UnknownNameError, match="did you mean 'salinas'"):
        load_scene("salina")
    with pytest.raises(OptionError, match="takes no"):
        load_scene("salinas", parcels=3)
    with pytest.raises(OptionError, match="needs `labels`"):
        load_scene(cube=tmp_path / "x.npy")


def scene(**changes):
    return Scene(**{"name": "s", "cube": CUBE, "labels": LABELS, "classes": ("a", "b", "c"), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "no label map"),
        ({"labels": LABELS.T}, r"\(7, 5\) do not fit a cube of shape \(5, 7, 11\) \(rows and columns are swapped\)"),
        ({"labels": LABELS[:3]}, r"\(3, 7\) do not fit"),
        ({"labels": LABELS * 0}, "every pixel is background"),
        ({"labels": LABELS + 1}, r"from 1 to 4; 3 classes allow 0..3"),
        ({"labels": LABELS - 1}, "from -1"),
        ({"labels": LABELS + 0.5}, "fractions"),
        ({"cube": CUBE * np.nan}, "no pixel is finite"),
    ],
)
def test_scenes_that_cannot_be_used(changes, message):
    with pytest.raises(ZooError, match=message):
        check_scene(scene(**changes))


def test_pixels_that_are_not_finite():
    cube = CUBE.copy()
    cube[2, 3, 4], cube[4, 6, 0] = np.nan, np.inf
    with pytest.raises(ZooError, match="2 of 35 pixels hold NaN or infinity, the first at row 2, column 3"):
        check_scene(scene(cube=cube))
    mended = check_scene(scene(cube=cube), bad_pixels="unlabelled")
    assert np.isfinite(mended.cube).all() and mended.labels[2, 3] == mended.labels[4, 6] == 0
    assert (mended.labels != LABELS).sum() <= 2


def test_own_files(tmp_path):
    np.save(tmp_path / "c.npy", CUBE)
    np.save(tmp_path / "l.npy", LABELS)
    found = load_scene("mine", cube=tmp_path / "c.npy", labels=tmp_path / "l.npy")
    assert found.name == "mine" and found.classes == ("class 1", "class 2", "class 3")
    np.save(tmp_path / "l.npy", LABELS + 0.25)
    with pytest.raises(ZooError, match="whole numbers"):
        load_scene(cube=tmp_path / "c.npy", labels=tmp_path / "l.npy")
