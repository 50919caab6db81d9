"""Errors in one line, Ctrl-C between two steps, and the device."""

import os
import signal
import sys

import pytest
import torch

from runtime.cli import Parser, find_device, one_line_errors, stop_after_step


def ending(capsys: pytest.CaptureFixture, error: BaseException,
           several: bool = False) -> tuple[object, str]:
    """(exit code, what is on stderr) of a program that raises `error`."""
    with pytest.raises(SystemExit) as stop, one_line_errors(several):
        raise error
    return stop.value.code, capsys.readouterr().err


# ---- errors ------------------------------------------------------------------------------------

@pytest.mark.parametrize("error, line", [
    (ValueError("eps is wrong"), "error: eps is wrong\n"),
    (ValueError("a\nb.pt is no \x1b[2J"), "error: a\\nb.pt is no \\x1b[2J\n"),
    (FileNotFoundError(2, "No such file", "a.pt"), "error: [Errno 2] No such file: 'a.pt'\n")])
def test_bad_input_is_one_line_and_code_2(capsys, error, line):
    assert ending(capsys, error) == (2, line)


@pytest.mark.parametrize("error", [
    MemoryError("Unable to allocate 9 x 2"), torch.OutOfMemoryError("9 x 2"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_lack_of_memory_tells_no_batch_size(capsys, error):
    code, line = ending(capsys, error)
    assert code == 2 and line.startswith("error: out of memory") and line.count("\n") == 1
    assert "--physical-batch" in line and "9" not in line


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("bug"), AssertionError("bug")])
def test_mistakes_of_the_code_keep_their_traceback(error):
    with pytest.raises(type(error), match="bug"), one_line_errors():
        raise error


@pytest.mark.parametrize("error, words", [
    (KeyboardInterrupt(), "\nstopped\n"), (KeyboardInterrupt("a\nb"), "\na\\nb\n")])
def test_ctrl_c_ends_with_code_130(capsys, error, words):
    code, line = ending(capsys, error)
    assert code == 130 and line == words   # below a progress bar


@pytest.mark.parametrize("several, rank, lines", [
    (True, "0", 1), (True, "1", 0), (False, "0", 1), (False, "1", 1)])
def test_where_processes_cannot_agree_the_first_speaks(monkeypatch, capsys, several, rank, lines):
    """Programs that work alone ignore what torchrun has left in the environment."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of a torchrun that has ended")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    for error, expected in ((ValueError("x"), 2), (KeyboardInterrupt("x"), 130)):
        code, printed = ending(capsys, error, several)
        assert code == expected and printed.count("x") == lines


def test_wrong_arguments_point_to_the_help():
    parser = Parser("what it does")
    parser.add_argument("--count", type=int)
    for argv in (["--count", "many"], ["--contu", "3"]):
        with pytest.raises(ValueError, match=r"--co.*\(--help lists the options\)$"):
            parser.parse_args(argv)


@pytest.mark.parametrize("words, meant", [
    ("--out=~/run", "HOME/run"), ("--out ~/run", "HOME/run"), ("--ou=~", "HOME"),
    ("--out=~root/run", "/root/run"), ("~/a.npz", "HOME/a.npz"), ("--data=a~", "a~"),
    ("--out=~nobody-of-this-name/a", "~nobody-of-this-name/a"), ("--out=./~/a", "./~/a")])
def test_a_tilde_is_the_home_folder(monkeypatch, words, meant):
    monkeypatch.setenv("HOME", "/home of/me")
    monkeypatch.setattr(sys, "argv", ["program", *words.split()])
    parser = Parser("what it does")
    parser.add_argument("--output", "--data")
    parser.add_argument("file", nargs="?")
    found = {value for value in vars(parser.parse_args()).values() if value}
    root = os.path.expanduser("~root")
    assert found == {meant.replace("HOME", "/home of/me").replace("/root", root)}


# ---- Ctrl-C ------------------------------------------------------------------------------------

def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_asks_to_stop_and_a_second_one_stops(capsys):
    with stop_after_step() as asked:
        assert not asked
        press_ctrl_c()
        assert asked and "stopping after this step" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()


def test_ctrl_c_afterwards_stops_at_once():
    with pytest.raises(RuntimeError), stop_after_step():
        raise RuntimeError
    with pytest.raises(KeyboardInterrupt):
        press_ctrl_c()


# ---- the device --------------------------------------------------------------------------------

@pytest.mark.parametrize("available, expected", [(True, "cuda"), (False, "cpu")])
def test_auto_is_a_gpu_where_there_is_one(monkeypatch, available, expected):
    asked, zeros = [], torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch, "zeros", lambda n, device: asked.append(device) or zeros(n))
    monkeypatch.setattr(torch, "empty", lambda n, device: zeros(n))
    find_device("auto")
    assert asked == [expected]


@pytest.mark.parametrize("name", ["abacus", "meta", "cuda:99", ""])
def test_an_unusable_device_is_named_in_one_line(name):
    assert find_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=f"device '{name}' cannot be used here") as error:
        find_device(name)
    assert "\n" not in str(error.value)
