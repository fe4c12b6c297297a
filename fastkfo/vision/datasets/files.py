"""Downloads and archives: whole or not at all, checked, and never outside of their folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from fastkfo.data.whole_files import written_whole

__all__ = ["download", "missing", "unzip"]

_CHUNK = 1 << 20


def missing(name: str, looked: Iterable[str | Path], how: str) -> FileNotFoundError:
    """Return the error for data that are not there.

    Args:
        name: Of the data set.
        looked: Where it was looked for.
        how: Where to get it, and where to put it.

    Returns:
        The error.
    """
    places = "".join(f"\n  {place}" for place in looked)
    return FileNotFoundError(f"{name}: not found. Looked for{places}\n{how}")


def download(url: str, path: Path, md5: str) -> None:
    """Download a file; it is there whole and checked, or not at all.

    Args:
        url: From where.
        path: To where; folders are made.
        md5: Its checksum, in hexadecimal digits.

    Raises:
        OSError: If it cannot be downloaded, or written.
        ValueError: If what came has another checksum.
    """
    from http.client import HTTPException
    from urllib.request import urlopen

    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with written_whole(path) as file, urlopen(url, timeout=30) as source:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
            if digest.hexdigest() != md5:
                raise ValueError(f"{url}: expected md5 {md5}, got {digest.hexdigest()}; not kept")
    except HTTPException as error:
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error


def unzip(archive: Path, target: Path) -> None:
    """Take the folder that is called as `target` out of an archive; whole or not at all.

    Args:
        archive: A zip file.
        target: Where the folder is to be; it keeps its name.

    Raises:
        ValueError: If the file is no whole zip file, has no such folder, or a name in it leads out
            of the folder it is unpacked to.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        refused = _extract(archive, scratch)
        if refused is not None:
            raise ValueError(f"{archive}: expected names of files inside of it, got {refused!r}")
        if not (scratch / target.name).is_dir():
            raise ValueError(f"{archive}: expected a folder {target.name} in it, got none")
        _move(scratch / target.name, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _extract(archive: Path, folder: Path) -> str | None:
    """Unpack everything; or nothing, if a name leads out of the folder, and return that name."""
    import zipfile

    try:
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                if _leads_out(member.filename, member.external_attr >> 16):
                    return member.filename
            opened.extractall(folder)
    except Exception as error:  # zipfile's, zlib's, lzma's, bz2's: a broken archive raises anything
        if isinstance(error, OSError) and error.errno is not None:  # of the disk
            raise
        reason = str(error) or type(error).__name__
        raise ValueError(f"{archive}: expected a whole zip file, got {reason}") from error
    return None


def _move(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except OSError:
        if not target.is_dir():  # else somebody else was faster
            raise


def _leads_out(name: str, mode: int) -> bool:
    path = PurePosixPath(name)
    out = path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name
    return out or stat.S_ISLNK(mode)
