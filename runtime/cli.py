"""What all command lines share: one-line errors, stopping between two steps, the device."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import torch

from runtime.distributed import lost_a_peer, may_speak
from runtime.terminal import on_one_line, robust_output

# Ctrl-C; what schedulers and shutdowns send; a terminal that is closed.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises its complaints as ValueError, for `one_line_errors`.

    ~ at the start of a value is the user's home folder: shells leave --out=~/run as it is.
    """

    def __init__(self, description: str):
        super().__init__(description=description,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_known_args(self, args: Sequence[str] | None = None,
                         namespace: argparse.Namespace | None = None) -> tuple:
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([in_home(word) for word in words], namespace)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists the options)")


def in_home(word: str) -> str:
    """A word of a command line, or --flag=VALUE, with a leading ~ or ~user spelled out."""
    flag, value = re.fullmatch(r"(--[\w-]+=)?(.*)", word, re.DOTALL).groups(default="")
    return flag + os.path.expanduser(value)


@contextmanager
def ctrl_c_raises() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt though runtime.quiet has been imported."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def say(line: str, below: str = "") -> None:
    """Print a line on stderr, if a terminal is left to print it on. below "\\n": a progress bar."""
    with suppress(OSError, RuntimeError):   # the latter in a signal's handler, amid other printing
        print(below + on_one_line(line), file=sys.stderr)


@contextmanager
def one_line_errors(several: bool = False) -> Iterator[None]:
    """Bad input ends the program with one line on stderr and exit code 2.

    A signal ends it with 128 and the signal's number, as a shell has it.
    several: torchrun may start several processes of this program. They fail together: the first
    error is reported, and no other. Other programs ignore what torchrun leaves in the environment.
    """
    def speaks() -> bool:
        return not several or may_speak()

    def finish(line: str, code: int, below: str = "") -> NoReturn:
        if speaks():
            say(line, below)
        sys.exit(code)

    try:
        with robust_output(), ctrl_c_raises():
            yield
    except KeyboardInterrupt as stop:
        number = getattr(stop, "number", signal.SIGINT)
        finish(str(stop) if stop.args else "stopped", 128 + number, below="\n")
    except (ValueError, OSError) as error:
        finish(f"error: {error}", 2)
    except Exception as error:
        if is_out_of_memory(error):
            # The message has no numbers: they could be the sizes of a private batch.
            finish("error: out of memory: lower --physical-batch (train.py), public.batch or "
                   "--columns", 2)
        if lost_a_peer(error):
            reason = str(error).splitlines()[0][:100]
            finish(f"error: another process of this run has ended ({reason})", 1)
        if speaks():
            raise
        sys.exit(1)


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


@contextmanager
def stop_after_step() -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM or SIGHUP inside fill the yielded list, for a loop to end between two steps.

    A second Ctrl-C stops at once; the other signals are often sent twice. A signal that was ignored
    stays so: nohup ignores SIGHUP, and jobs in the background ignore SIGINT.
    """
    stop: list[int] = []
    before = {number: handler for number in STOPPING
              if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)}

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:   # someone sits there
            say("stopping after this step (Ctrl-C again: at once)", below="\n")
        stop.append(number)
        if signal.SIGINT in before:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    except KeyboardInterrupt as interrupt:
        interrupt.number = stop[0] if stop else signal.SIGINT
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
