"""What all command lines share: one-line errors, Ctrl-C between two steps, the device."""

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import torch

from runtime.distributed import is_first_process


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises its complaints as ValueError, for `one_line_errors`."""

    def __init__(self, description: str):
        super().__init__(description=description,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists the options)")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Bad input ends the program with one line on stderr and exit code 2, Ctrl-C with 130.

    torchrun's processes fail alike: the first one speaks for all.
    """
    first = is_first_process()
    try:
        yield
    except KeyboardInterrupt as stop:
        if first:
            print(f"\n{stop}" if stop.args else "\nstopped", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not out_of_memory and "DefaultCPUAllocator" not in str(error):
            raise
        # The message has no numbers: they could be the sizes of a private batch.
        print("error: out of memory: lower --physical-batch (train.py), public.batch or --columns",
              file=sys.stderr)
        sys.exit(2)


@contextmanager
def stop_after_step() -> Iterator[list[int]]:
    """Ctrl-C inside fills the yielded list, for a loop to end between two steps.

    A second Ctrl-C stops at once.
    """
    stop: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        print("\nstopping after this step (Ctrl-C again: at once)", file=sys.stderr)
        stop.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is one. ValueError if it is unusable."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()   # "meta" has no values
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}") from error
