"""What programs print, whatever the terminal or pipe that they print into."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


class Output:
    """A stream that escapes what its encoding lacks, and drops what a closed one does not take.

    So neither a name nor `| head -1` ends a run. Where a disk is full, OSError is raised once.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream
        with suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, action: Callable, *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            with suppress(OSError, AttributeError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())   # also for Python's last flush
            if error.errno not in (errno.EPIPE, errno.EIO):   # EIO: the terminal is gone
                raise


@contextmanager
def robust_output() -> Iterator[None]:
    """Inside, stdout and stderr are an `Output`. Where one is closed, it leads nowhere."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        outputs = sys.stdout, sys.stderr = [Output(stream or nowhere) for stream in before]
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            for output in outputs:
                output.flush()


def on_one_line(text: str) -> str:
    """`text` with line breaks, control characters and the like spelled out, as repr does it.

    A file's name or a class's may hold them, and would break a message or command the terminal.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
