"""Pickles of others: plain data come through, names of anything else run nothing."""

import builtins
import collections
import os
import pickle

import numpy as np
import pytest

from fastkfo.data.unpickling import UnsafePickleError, load_plain

IMAGES = np.arange(2 * 3 * 3 * 4, dtype=np.uint8).reshape(2, 3, 3, 4)


def written(tmp_path, value, protocol=4):
    path = tmp_path / "some.pkl"
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "array",
    [
        IMAGES,
        np.asfortranarray(IMAGES),
        IMAGES[:, ::2],
        np.array([[1.5, -2.0]], dtype=">f4"),
        np.zeros((0, 3), dtype=np.int64),
        np.array([True, False]),
        np.array(0.25),
    ],
    ids=["bytes", "fortran", "strided", "big-endian", "empty", "bools", "scalar"],
)
def test_arrays(tmp_path, array, protocol):
    got = load_plain(written(tmp_path, {"image_data": array, "more": [(array,)]}, protocol))
    for found in (got["image_data"], got["more"][0][0]):
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
        assert found.flags.writeable


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values(tmp_path, protocol):
    value = {
        "a": [1, 2.5, None, True, b"\xff\x00", "\u00e9"],
        ("b", 2): {3, 4},
        "n": [np.int64(3), np.float32(0.5)],
    }
    assert load_plain(written(tmp_path, value, protocol)) == value
    books = collections.defaultdict(list, {3: [1, 2]})
    books_of_ints = collections.defaultdict(int, {1: 2})
    got = load_plain(written(tmp_path, [books, books_of_ints], protocol))
    assert got == [{3: [1, 2]}, {1: 2}]
    assert type(got[0]) is dict


def test_arrays_as_python_2_and_older_numpy_wrote_them(tmp_path):
    raw = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\ntcnumpy\ndtype\n"
        b"(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x07\\xfe'\ntb."
    )
    assert load_plain(written(tmp_path, raw)).tolist() == [7, 254]


class Names:
    """Pickles to a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def refused(tmp_path, value):
    path = written(tmp_path, value)
    with pytest.raises(UnsafePickleError, match=r"some.pkl: refused") as caught:
        load_plain(path)
    assert isinstance(caught.value, pickle.UnpicklingError)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


def test_a_pickle_creates_no_file(tmp_path):
    target = tmp_path / "created"
    for function, arguments in (
        (os.system, (f"touch {target}",)),
        (builtins.open, (str(target), "w")),
        (builtins.eval, (f"open({str(target)!r}, 'w')",)),
        (np.save, (str(target), 1)),
    ):
        name = f"{function.__module__}.{function.__name__}"
        message = refused(tmp_path, [Names(function, *arguments)])
        if function is not np.save:
            assert name.replace("_io", "io") in message.replace("_io", "io")
    assert os.listdir(tmp_path) == ["some.pkl"]


@pytest.mark.parametrize(
    "value",
    [
        np.array([object()]),
        np.array(["text"]),
        np.zeros(2, dtype=[("a", int)]),
        np.zeros(2, dtype="M8[s]"),
        Names(list, (1, 2)),
        Names(int, "3"),
        Names(getattr, 1, "real"),
        collections.OrderedDict(a=1),
        range(3),
    ],
    ids=["objects", "text", "records", "dates", "list", "int", "getattr", "ordered", "range"],
)
def test_refused(tmp_path, value):
    refused(tmp_path, value)


def test_what_stands_for_names_cannot_be_changed(tmp_path):
    from fastkfo.data import unpickling

    before = {name: getattr(made, "make", made) for name, made in unpickling._NAMES.items()}
    for state in (b"}(X\x04\x00\x00\x00makeNu", b"N}(X\x04\x00\x00\x00makeNu\x86"):
        for name in (b"cnumpy\ndtype\n", b"c_codecs\nencode\n", b"ccollections\ndefaultdict\n"):
            with pytest.raises(ValueError, match=r"some.pkl"):
                load_plain(written(tmp_path, b"\x80\x02" + name + state + b"b."))
    assert {n: getattr(made, "make", made) for n, made in unpickling._NAMES.items()} == before


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_cut_short_at_any_place(tmp_path, protocol):
    whole = pickle.dumps({"image_data": IMAGES, "class_dict": {"n01": [0, 1]}}, protocol)
    for end in range(0, len(whole) - 1, 3):
        with pytest.raises(ValueError, match=r"some.pkl: (expected a whole pickle|refused)"):
            load_plain(written(tmp_path, whole[:end]))


def test_garbage_and_missing_files(tmp_path):
    for content in (b"PK\x03\x04 a zip", b"<html>", b"\x80\x63.", b"]a.", b"]\x94q\x00h\x00a."):
        with pytest.raises(ValueError, match=r"some.pkl"):
            load_plain(written(tmp_path, content))
    with pytest.raises(FileNotFoundError):
        load_plain(tmp_path / "none.pkl")
