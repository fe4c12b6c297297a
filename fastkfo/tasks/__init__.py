"""Few-shot task distributions that need no download."""

from fastkfo.tasks.digits import DigitTasks, Episodes

__all__ = ["DigitTasks", "Episodes"]
