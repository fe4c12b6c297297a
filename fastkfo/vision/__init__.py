"""Few-shot vision under learn2learn's names: its models; not its data sets, nor its transforms."""

from fastkfo.vision import models

__all__ = ["models"]
