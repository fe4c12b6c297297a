"""What a training is: its options, where they come from, and how they are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fastkfo.training.config_files import read, write

__all__ = ["TrainConfig", "from_mapping", "read_config", "write_config"]

# The types of the fields, as their annotations spell them: what is accepted, and its name.
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
}


#: Seeds are below it: a split's is up to 3 * seed + 2, and PyTorch's have 64 bits.
SEEDS = 2**61


def _option(default: Any, text: str, least: int | None = None, most: float | None = None) -> Any:
    """A field with its help, and the least and greatest value that it may have."""
    if most is None and least is not None:
        most = 2**31 - 1  # beyond what any count is meant to be
    return field(default=default, metadata={"help": text, "least": least, "most": most})


@dataclass(frozen=True)
class TrainConfig:
    """The options of a training; ``fastkfo train --help`` says what each means.

    Every field is an option of the command and a key of a config file. Wrong types and values out
    of range raise here; names (of methods, data sets, backbones) where they are looked up.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field is out of range.

    Example:
        >>> config = TrainConfig(method="anil-kfo", iterations=200)
        >>> Trainer(config).run().test
    """

    method: str = _option("maml-kfo", "What is learned, and how it adapts.")
    dataset: str = _option(
        "digits", "A name, or a folder with train, validation and test in it, a folder per class."
    )
    root: str = _option("~/data", "Folder of the data sets that are files.")
    download: bool = _option(False, "Whether files that are missing under root are fetched.")
    image_size: int = _option(0, "Side to resize the images of a folder to; 0: as they are.", 0)
    ways: int = _option(5, "Classes per task (not for sinusoid).", 2)
    shots: int = _option(5, "Support samples per class (sinusoid: points).", 1)
    queries: int = _option(15, "Query samples per class (sinusoid: points).", 1)
    steps: int = _option(5, "Inner steps.", 1)
    meta_batch: int = _option(16, "Tasks per iteration.", 1)
    fast_lr: float | None = _option(None, "Inner learning rate; default: 0.1, for sinusoid 0.01.")
    meta_lr: float = _option(0.001, "Learning rate of Adam.", most=1e6)
    iterations: int = _option(1000, "Meta-iterations.", 1)
    seed: int = _option(0, "Of initial weights and tasks.", 0, SEEDS - 1)
    device: str = _option("cpu", "cpu, cuda or cuda:N.")
    dtype: str = _option("float32", "float32 or float64.")
    backbone: str = _option("auto", "The network; auto: what suits the data set.")
    linear_layers: int = _option(3, "Linear layers that maml-linnet adds before the head.", 1)
    hidden_kfo_layers: int = _option(
        0, "Hidden layers of a non-linear KFO; 0: plain Kronecker factors.", 0
    )
    adapt_transform: bool | None = _option(
        None, "Whether the transform is adapted as well; default: with linear KFO, yes."
    )
    first_order: bool = _option(False, "Whether inner gradients are constants.")
    validate_every: int = _option(100, "Iterations between validations; 0: none.", 0)
    validation_tasks: int = _option(100, "Validation tasks, the same every time.", 2)
    checkpoint_every: int = _option(
        100, "Iterations between checkpoints besides; 0: at validations alone.", 0
    )
    test_tasks: int = _option(600, "Test tasks at the end; 0: no test.", 0)
    patience: int = _option(
        20, "Iterations in a row with a loss or gradient that is not finite, before it ends.", 1
    )
    out: str = _option("", "Run folder; default: fastkfo-runs/DATASET-METHOD-SEED.")
    tensorboard: bool = _option(False, "Whether TensorBoard gets the metrics (if installed).")
    wandb: bool = _option(False, "Whether Weights & Biases gets the metrics (if installed).")

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            _check_type(each, value)
            least, most = each.metadata["least"], each.metadata["most"]
            if least is not None and value < least:
                raise ValueError(f"{each.name}: expected at least {least}, got {value}")
            if most is not None and value > most:
                raise ValueError(f"{each.name}: expected at most {most}, got {value}")
        for name in ("fast_lr", "meta_lr"):
            value = getattr(self, name)
            if value is None:
                continue
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a positive finite number, got {value}")
            object.__setattr__(self, name, float(value))  # an int in a file
        if self.test_tasks == 1:
            raise ValueError("test_tasks: expected 0 or at least 2, for an interval, got 1")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype: expected float32 or float64, got {self.dtype!r}")

    @property
    def folder(self) -> Path:
        """The run folder."""
        name = Path(self.dataset.rstrip("/")).name or "dataset"
        return Path(self.out or f"fastkfo-runs/{name}-{self.method}-{self.seed}").expanduser()

    def changed(self, **options: Any) -> TrainConfig:
        """The same with some options replaced, checked again.

        Args:
            options: Fields and their values.

        Returns:
            A new config.
        """
        return replace(self, **options)

    def to_mapping(self) -> dict[str, Any]:
        """All fields by name, but for those that are None, which no TOML can hold."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def from_mapping(values: Mapping[str, Any], where: str = "config") -> TrainConfig:
    """A config from names and values, the rest at their defaults.

    Args:
        values: Fields by name.
        where: What the values are from, for the message.

    Returns:
        The config.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a name is no field, or a value out of range.
    """
    check_keys(values, where)
    return TrainConfig(**values)


def check_keys(values: Mapping[str, Any], where: str) -> None:
    """Raises unless every key is a field.

    Raises:
        ValueError: One is not; the message lists those that are.
    """
    known = [each.name for each in fields(TrainConfig)]
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        raise ValueError(
            f"{where}: unknown {', '.join(unknown)}; expected some of {', '.join(known)}"
        )


def read_config(path: str | Path) -> dict[str, Any]:
    """The options in a YAML (``.yaml``, ``.yml``) or TOML (``.toml``) file.

    Args:
        path: The file. Keys may have ``-`` or ``_``.

    Returns:
        Fields by name, their types not checked yet.

    Raises:
        ModuleNotFoundError: If what reads such a file is not installed.
        ValueError: If there is no such file, it cannot be read, or it has a key that is no option.
    """
    values = {str(key).replace("-", "_"): value for key, value in read(Path(path)).items()}
    check_keys(values, str(path))
    return values


def write_config(path: str | Path, config: TrainConfig) -> None:
    """Writes a TOML file that `read_config` reads.

    Args:
        path: The file.
        config: What to write.
    """
    write(Path(path), config.to_mapping())


def _check_type(each: Field[Any], value: Any) -> None:
    kind, _, optional = str(each.type).partition(" | ")
    if optional and value is None:
        return
    # A bool is an int to Python, but not to who wrote `steps: true`.
    if not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "bool"):
        article = "an" if kind == "int" else "a"
        raise TypeError(f"{each.name}: expected {article} {kind}, got {value!r}")
