"""Downloads and archives: whole and checked, or nothing; never outside of their folder."""

import functools
import hashlib
import http.server
import os
import shutil
import threading
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from fastkfo.vision import datasets
from fastkfo.vision.datasets import files, full_omniglot
from tests import images


def same_samples(mine, yours):
    assert len(mine) == len(yours) > 0
    for (x, y), (other_x, other_y) in zip(mine, yours, strict=True):
        assert y == other_y
        np.testing.assert_array_equal(np.asarray(x), np.asarray(other_x))


@pytest.fixture
def server(tmp_path):
    """A folder and the address that it is served at."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with mock.patch.object(http.server.SimpleHTTPRequestHandler, "log_message"):
        served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        served.server_close()
        thread.join()


def zipped_omniglot(tmp_path, folder):
    """Both archives; their checksums."""
    made = Path(images.omniglot(tmp_path / "made")) / "omniglot-py"
    sums = {}
    for part in ("images_background", "images_evaluation"):
        shutil.make_archive(str(folder / part), "zip", made, part)
        sums[part] = hashlib.md5((folder / f"{part}.zip").read_bytes()).hexdigest()
    return sums


def test_download(tmp_path, server, monkeypatch):
    folder, address = server
    monkeypatch.setattr(full_omniglot, "_ADDRESS", address)
    monkeypatch.setattr(full_omniglot, "_MD5", zipped_omniglot(tmp_path, folder))
    root = tmp_path / "root"
    dataset = datasets.FullOmniglot(str(root), download=True)
    same_samples(dataset, datasets.FullOmniglot(str(tmp_path / "made")))
    kept = [
        "images_background",
        "images_background.zip",
        "images_evaluation",
        "images_evaluation.zip",
    ]
    assert sorted(os.listdir(root / "omniglot-py")) == kept
    with mock.patch("urllib.request.urlopen", side_effect=AssertionError):
        same_samples(datasets.FullOmniglot(str(root), download=True), dataset)


def test_archives_that_lie_in_the_root(tmp_path):
    zipped_omniglot(tmp_path, tmp_path)
    same_samples(
        datasets.FullOmniglot(str(tmp_path)), datasets.FullOmniglot(str(tmp_path / "made"))
    )


def test_a_download_with_another_checksum_is_not_kept(tmp_path, server, monkeypatch):
    folder, address = server
    zipped_omniglot(tmp_path, folder)
    monkeypatch.setattr(full_omniglot, "_ADDRESS", address)
    root = tmp_path / "root"
    message = (
        "images_background.zip: expected md5 68d2efa1b9178cc56df9314c21c6e718, got .*; not kept"
    )
    with pytest.raises(ValueError, match=message):
        datasets.FullOmniglot(str(root), download=True)
    assert os.listdir(root / "omniglot-py") == []
    with pytest.raises(OSError, match="404"):
        files.download(f"{address}/none.zip", root / "none.zip", "0")
    assert not (root / "none.zip").exists()


class Breaking:
    """A connection that breaks."""

    def __init__(self):
        self.parts = [b"PK\x03\x04", b"half"]

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def read(self, size):
        if not self.parts:
            raise ConnectionResetError("broken")
        return self.parts.pop()


def test_half_a_download_leaves_nothing(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"before")
    breaking = mock.patch("urllib.request.urlopen", return_value=Breaking())
    with breaking, pytest.raises(OSError, match="broken"):
        files.download("http://nowhere/a.zip", tmp_path / "a.zip", "0")
    assert os.listdir(tmp_path) == ["a.zip"]
    assert (tmp_path / "a.zip").read_bytes() == b"before"


def unpacked(tmp_path, *names, target="data"):
    archive, folder = tmp_path / "a.zip", tmp_path / "in" / target
    with zipfile.ZipFile(archive, "w") as file:
        for name in names:
            file.writestr(name, "content")
    files.unzip(archive, folder)
    return folder


@pytest.mark.parametrize(
    "name", ["../out.txt", "data/../../out.txt", "/out.txt", "data\\..\\out", "C:/out"]
)
def test_archives_cannot_leave_their_folder(tmp_path, name):
    with pytest.raises(ValueError, match=r"a.zip: expected names of files inside of it, got"):
        unpacked(tmp_path, "data/good.txt", name)
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "in"]
    assert os.listdir(tmp_path / "in") == []


def test_archives_with_links(tmp_path):
    link = zipfile.ZipInfo("data/link")
    link.external_attr = 0o120777 << 16
    with pytest.raises(ValueError, match="got 'data/link'"):
        unpacked(tmp_path, "data/good.txt", link)


def test_broken_archives(tmp_path):
    assert os.listdir(unpacked(tmp_path, "data/good.txt")) == ["good.txt"]
    with pytest.raises(ValueError, match=r"a.zip: expected a folder other in it, got none"):
        unpacked(tmp_path, "data/good.txt", target="other")
    whole = (tmp_path / "a.zip").read_bytes()
    wrong = bytearray(whole)
    wrong[40] ^= 1  # of the content: its checksum is off
    for content in (whole[:-30], b"", b"<html>not found", bytes(wrong)):
        (tmp_path / "a.zip").write_bytes(content)
        with pytest.raises(ValueError, match=r"a.zip: expected a whole zip file"):
            files.unzip(tmp_path / "a.zip", tmp_path / "again" / "data")
        assert os.listdir(tmp_path / "again") == []


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_broken_compression(tmp_path, method):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", method) as file:
        file.writestr("data/x.txt", b"content " * 100)
    content = bytearray(archive.read_bytes())
    content[44:60] = b"\xff" * 16  # past the header of the member
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=r"a.zip: expected a whole zip file"):
        files.unzip(archive, tmp_path / "in" / "data")
    assert os.listdir(tmp_path / "in") == []
