"""Ctrl-C and SIGTERM as a flag, so that what has begun is finished."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType

__all__ = ["Interrupts"]


class Interrupts:
    """Turns the first Ctrl-C or SIGTERM into a flag; the second ends the process at once.

    Attributes:
        signal: The signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        """Installs the handlers."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Puts the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @property
    def exit_code(self) -> int:
        """What the process should end with: 0, 130 after Ctrl-C, 143 after SIGTERM."""
        return 0 if self.signal is None else 128 + self.signal

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h\n")  # the progress bar hides the cursor
            os._exit(128 + number)
        self.signal = signal.Signals(number)
