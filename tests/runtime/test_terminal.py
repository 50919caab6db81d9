"""What programs print: in a terminal of ASCII, into a closed pipe, onto a full disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from runtime.cli import one_line_errors
from runtime.terminal import on_one_line

ROOT = Path(__file__).resolve().parents[2]


def program(code: str, *more: str, **options: object) -> subprocess.Popen:
    """A program of a few lines, in a terminal of ASCII."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
                   "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""}
    return subprocess.Popen([sys.executable, "-c", code, *more], cwd=ROOT, env=environment,
                            stderr=subprocess.PIPE, **options)


NAMES = r"""
import sys
from runtime.terminal import robust_output
with robust_output():
    print("h\xe9 \u732b \udce9", sys.argv[1])
"""


def test_a_terminal_of_ascii_shows_other_names_escaped():
    out, err = program(NAMES, "\xe9", stdout=subprocess.PIPE).communicate()
    assert (out, err) == (b"h\\xe9 \\u732b \\udce9 \\udcc3\\udca9\n", b"")


LINES = """
import os, sys
from runtime.terminal import robust_output
if sys.argv[2] == "both":
    os.dup2(1, 2)
with robust_output():
    for k in range(9):
        print("a line", flush=k == 5)
        print("more", file=sys.stderr)
    print("the last line")
    open(sys.argv[1], "w").close()
"""


@pytest.mark.parametrize("closed", ["one", "both"])
def test_a_closed_pipe_ends_no_run(tmp_path, closed):
    """Neither while it prints nor at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    done = program(LINES, str(tmp_path / "saved"), closed, stdout=writer)
    os.close(writer)
    assert done.communicate()[1] == (9 * b"more\n" if closed == "one" else b"")
    assert done.returncode == 0 and (tmp_path / "saved").exists()


LAST = """
from runtime.cli import one_line_errors
with one_line_errors():
    print("a line")
    raise ValueError
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
def test_output_onto_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = program(LAST, stdout=full)
    err = done.communicate()[1]
    assert err.startswith(b"error: [Errno 28]") and err.count(b"\n") == 1
    assert done.returncode == 2


def test_a_program_without_output_works(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as stop, one_line_errors():
        for _ in tqdm(range(2)):   # it asks for stderr itself
            sys.stdout.write("a line")
        raise ValueError
    assert stop.value.code == 2


@pytest.mark.parametrize("text, shown", [
    ("two words: é 猫 'a'", "two words: é 猫 'a'"), ("a\nb\r\n\tc", "a\\nb\\r\\n\\tc"),
    ("\x1b[2J\x07\0\x7f", "\\x1b[2J\\x07\\x00\\x7f"), ("\x85\u2028\u2029", "\\x85\\u2028\\u2029"),
    ("\u202egnp.exe", "\\u202egnp.exe"), ("\udce9", "\\udce9")])   # read backwards; half a letter
def test_control_characters_are_spelled_out(text, shown):
    assert on_one_line(text) == shown
