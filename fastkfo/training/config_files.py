"""Flat config files: YAML and TOML are read, TOML is written."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastkfo.training.checkpoints import write_whole

__all__ = ["read", "write"]


def read(path: Path) -> dict[str, Any]:
    """The top level of a file, by its suffix.

    Args:
        path: ``.yaml``, ``.yml`` or ``.toml``.

    Returns:
        Keys and values; an empty file has none.

    Raises:
        ModuleNotFoundError: If PyYAML or tomli is needed and not installed.
        ValueError: If the suffix is another, the file cannot be read, or it holds no mapping.
    """
    readers = {".yaml": _yaml, ".yml": _yaml, ".toml": _toml}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"config: expected a .yaml, .yml or .toml file, got {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config: expected a file that can be read, got {path}: {error}") from None
    values = reader(text, path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"config: expected keys and values in {path}, got {type(values).__name__}")
    return values


def write(path: Path, values: Mapping[str, Any]) -> None:
    """Writes ``key = value`` lines, all of them or none.

    Args:
        path: The file.
        values: Strings, numbers and bools by bare keys.
    """
    lines = [f"{key} = {_spelt(value)}\n" for key, value in values.items()]
    write_whole(path, lambda file: file.write("".join(lines).encode()))


def _spelt(value: str | float) -> str:
    """A string, number or bool as TOML; JSON's spelling of these is one of TOML's."""
    # DEL alone is allowed raw in JSON and not in TOML.
    return json.dumps(value).replace("\x7f", "\\u007f")


def _yaml(text: str, path: Path) -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"config: {path} needs PyYAML: pip install --no-build-isolation '.[train]', "
            "or write TOML",
            name=error.name,
        ) from None

    class Loader(yaml.SafeLoader):
        """With the numbers of YAML 1.2: to 1.1 and PyYAML, 1e-2 is a string."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"config: expected YAML in {path}, got {_one_line(error)}") from None


def _toml(text: str, path: Path) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"config: {path} needs tomli: pip install --no-build-isolation '.[train]'",
                name=error.name,
            ) from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config: expected TOML in {path}, got {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
