"""What stops a run from outside: signals save as Ctrl-C does, and a shell sees which it was."""

import os
import signal
import sys
from collections.abc import Iterator

import pytest

import train
from runtime.checkpoints import load_checkpoint
from runtime.cli import one_line_errors, stop_after_step
from tiny import arguments

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def harmless(number: int, frame: object) -> None:
    """A handler that is not the default, which would end the tests."""


@pytest.fixture(params=SIGNALS, ids=lambda number: number.name)
def number(request: pytest.FixtureRequest) -> Iterator[int]:
    """A signal which does nothing unless it is handled."""
    before = {number: signal.signal(number, harmless) for number in SIGNALS}
    yield request.param
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_asks_to_stop_and_tells_its_number(capsys, number):
    with pytest.raises(SystemExit) as stop, one_line_errors(), stop_after_step() as asked:
        os.kill(os.getpid(), number)
        assert asked == [number]
        raise KeyboardInterrupt("stopped after 3 steps")
    assert stop.value.code == 128 + number and "after 3 steps" in capsys.readouterr().err
    assert all(signal.getsignal(other) is harmless for other in SIGNALS)


@pytest.mark.parametrize("number", SIGNALS[1:], indirect=True, ids=lambda number: number.name)
def test_signals_that_are_sent_twice_ask_once_more(number):
    with stop_after_step() as asked:
        for _ in range(2):
            os.kill(os.getpid(), number)
        assert asked == [number, number]


def test_what_was_ignored_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    with stop_after_step() as asked:
        os.kill(os.getpid(), number)
        assert not asked and signal.getsignal(number) is signal.SIG_IGN


def test_a_closed_terminal_does_not_hinder_stopping(monkeypatch, number):
    class Closed:
        def write(self, text: str) -> None:
            raise OSError(5, "Input/output error")

        def flush(self) -> None:
            self.write("")

    monkeypatch.setattr(sys, "stderr", Closed())
    with pytest.raises(SystemExit) as stop, one_line_errors(), stop_after_step() as asked:
        os.kill(os.getpid(), number)
        raise KeyboardInterrupt(f"{len(asked)} signal")
    assert stop.value.code == 128 + number


@pytest.mark.parametrize("number", SIGNALS[1:], indirect=True, ids=lambda number: number.name)
def test_a_signal_ends_the_step_and_saves(public, tmp_path, in_step, capsys, number):
    steps = in_step(3, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stop, one_line_errors():
        train.main(arguments(public, tmp_path))
    assert stop.value.code == 128 + number and len(steps) == 3
    assert "--resume goes on from here" in capsys.readouterr().err
    unfinished = load_checkpoint(tmp_path / "private-eps3.unfinished.pt")[1]
    assert unfinished["training"]["step"] == 3
