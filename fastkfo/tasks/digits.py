"""Few-shot episodes from scikit-learn's handwritten digits (8x8, shipped inside scikit-learn).

Ten digits make few classes, so the split is this (there is no standard one):

- ``train``: digits 0 to 4. A class is a digit at one of four rotations by 90 degrees, as is usual
  on Omniglot. A task never holds one digit twice, because a rotated 0 or 1 is still a 0 or 1.
  For 5-way tasks that leaves 4^5 sets of classes, in 5! orders.
- ``valid`` and ``test``: digits 5 to 9, upright, never seen in training at any rotation. ``valid``
  draws from the first half of each digit's images, ``test`` from the second.

6 and 9 are on the same side because each is the other upside down. For 5-way tasks there is one
set of unseen classes, so test tasks differ in their images and in the order of their labels only:
an interval over test tasks says nothing about other digits.
"""

from __future__ import annotations

import torch

from fastkfo.tasks import checks, draws
from fastkfo.tasks.distribution import Episodes, TaskDistribution

__all__ = ["SPLITS", "DigitTasks", "Episodes"]

SPLITS: dict[str, tuple[int, ...]] = {
    "train": (0, 1, 2, 3, 4),
    "valid": (5, 6, 7, 8, 9),
    "test": (5, 6, 7, 8, 9),
}


class DigitTasks(TaskDistribution):
    """Balanced few-shot classification tasks on 8x8 digits.

    Images have zero mean and unit variance, both taken from the training digits over all pixels.
    Within a task no image is drawn twice, so support and query never share one.

    Args:
        split: ``"train"``, ``"valid"`` or ``"test"`` (the module's docstring says what they hold).
        ways: Classes per task; S = ways * shots and Q = ways * queries.
        shots: Support images per class.
        queries: Query images per class.
        seed: Seeds this object's own generator; the global one is left alone.
        digits: Digits to draw from instead of the split's own (the ``valid`` and ``test`` halves
            of their images, and the rotations of ``train``, stay those of ``split``).
        dtype: Of the images. Default: ``torch.get_default_dtype()``.
        device: Of everything returned. Tasks are drawn on the CPU, so they are the same anywhere.

    Raises:
        TypeError: If ways, shots, queries or seed is no integer, or dtype is no floating dtype.
        ValueError: If the split is unknown, or has too few classes or images.
        ModuleNotFoundError: If scikit-learn is not installed.

    Example:
        >>> tasks = DigitTasks("train", ways=5, shots=1, queries=15, seed=0)
        >>> x_s, y_s, x_q, y_q = tasks.sample(32)
        >>> x_q.shape
        torch.Size([32, 75, 1, 8, 8])

    Source:
        E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998;
        ``sklearn.datasets.load_digits``.
    """

    def __init__(
        self,
        split: str = "train",
        ways: int = 5,
        shots: int = 5,
        queries: int = 15,
        *,
        seed: int = 0,
        digits: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        checks.count("ways", ways)
        checks.count("shots", shots)
        checks.count("queries", queries)
        super().__init__(seed=seed, device=device, generator="cpu")
        dtype = checks.floating("dtype", dtype)
        digits = SPLITS[split] if digits is None else tuple(digits)
        if len(set(digits)) != len(digits) or not set(digits) <= set(range(10)):
            raise ValueError(f"digits: expected distinct digits from 0 to 9, got {digits}")
        if ways > len(digits):
            raise ValueError(
                f"ways: expected at most {len(digits)}, the digits of split {split!r}, got {ways}"
            )
        images, targets = _load()
        train = torch.isin(targets, torch.tensor(SPLITS["train"]))
        images = (images - images[train].mean()) / images[train].std()

        members = [(targets == digit).nonzero().squeeze(1) for digit in digits]
        if split != "train":
            second = split == "test"
            members = [m[len(m) // 2 :] if second else m[: len(m) // 2] for m in members]
        fewest = min(len(m) for m in members)
        if shots + queries > fewest:
            raise ValueError(
                f"shots + queries: expected at most {fewest}, the images of the rarest class of "
                f"split {split!r}, got {shots} + {queries} = {shots + queries}"
            )
        self.split, self.ways, self.shots, self.queries = split, ways, shots, queries
        self.digits, self.dtype = digits, dtype
        self.rotations = 4 if split == "train" else 1
        # [R * N, 8, 8]: all images at all rotations (230 KB each)
        self._images_per_rotation = len(images)
        self._images = torch.cat(
            [torch.rot90(images, r, (1, 2)) for r in range(self.rotations)]
        ).to(dtype)
        # [D, M]: the images of each digit, ragged rows padded with -1
        self._members = torch.nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=-1)

    def _draw(self, tasks: int) -> Episodes:
        per_class = self.shots + self.queries
        # A random order cut short is a draw without replacement.
        order = torch.rand(tasks, len(self.digits), generator=self._generator).argsort(1)
        row = order[:, : self.ways]  # [T, ways]
        rotation = torch.randint(self.rotations, (tasks, self.ways), generator=self._generator)
        pool = self._members[row]  # [T, ways, M]
        keys = torch.rand(pool.shape, generator=self._generator).masked_fill_(pool < 0, 2.0)
        chosen = pool.gather(2, draws.smallest(keys, per_class))  # [T, ways, shots + queries]
        index = (rotation * self._images_per_rotation)[..., None] + chosen
        y = torch.arange(self.ways, device=self.device)
        found: list[torch.Tensor] = []
        for part in index.split([self.shots, self.queries], 2):
            x = self._images.index_select(0, part.flatten()).to(self.device)
            found.append(x.view(tasks, -1, 1, 8, 8))
            found.append(y.repeat_interleave(part.shape[2]).repeat(tasks, 1))
        return Episodes(*found)


def _load() -> tuple[torch.Tensor, torch.Tensor]:
    """Loads all images [N, 8, 8] (float64, 0 to 16) and digits [N] (int64)."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "DigitTasks needs scikit-learn, which carries the images: "
            "pip install --no-build-isolation '.[demo]'",
            name=error.name,
        ) from error
    data = load_digits()
    return torch.from_numpy(data.images), torch.from_numpy(data.target).long()
