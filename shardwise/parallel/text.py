"""Streaming text of one request: tokens in, certain text out, ended by stop strings."""

from collections.abc import Callable, Sequence


class TextStream:
    """Joins a detokeniser's pieces and holds back what may become a stop string."""

    def __init__(self, detokenise: Callable[[int], str], stop: Sequence[str] = ()):
        self._detokenise, self._stop = detokenise, tuple(stop)
        self._held = ""
        self.stopped = False
        """A stop string was found; it and what follows are not given out."""

    def push(self, token: int) -> str:
        """Text that became certain with this token, often ``""``."""
        text = self._held + self._detokenise(token)
        if not self._stop:
            return text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What is still held back, once no token follows."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
