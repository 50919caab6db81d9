"""Ctrl-C while the packages load, a closed pipe, a full disk: no program shows a traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALONE = ["accountant.py", "-m variants.pld"]   # they stand below runtime/
PROGRAMS = ["train.py", "sample.py", "evaluate.py", "audit.py", "data.py", *ALONE]
# Instead of a package that takes long to load: Ctrl-C comes while it does.
LOADING = """
import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
time.sleep(0.01)
os._exit(0 if signal.getsignal(signal.SIGINT) == signal.SIG_IGN else 1)
"""


def start(program: str, *more: str, **options: object) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.Popen([sys.executable, *program.split(), *more], cwd=ROOT, env=environment,
                            stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("handler, code", [(signal.SIG_DFL, -signal.SIGINT), (signal.SIG_IGN, 0)],
                         ids=["foreground", "background"])
def test_ctrl_c_while_packages_load_is_quiet(tmp_path, program, handler, code):
    for name in ("numpy", "torch", "scipy", "PIL"):
        (tmp_path / f"{name}.py").write_text(LOADING)
    process = start(program, env={"PYTHONPATH": str(tmp_path)},
                    preexec_fn=lambda: signal.signal(signal.SIGINT, handler))
    assert process.communicate()[1] == b"" and process.returncode == code


@pytest.mark.parametrize("program", ALONE)
def test_the_accountants_leave_a_closed_pipe_quietly(program):
    reader, writer = os.pipe()
    os.close(reader)
    process = start(program, "--help", stdout=writer)
    os.close(writer)
    assert process.communicate()[1] == b"" and process.returncode == -signal.SIGPIPE


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
@pytest.mark.parametrize("program", ALONE)
def test_the_accountants_tell_of_a_full_disk(program):
    flags = "--sample-rate 0.1 --steps 1 --delta 1e-5 --noise-multiplier 1".split()
    with open("/dev/full", "w") as full:
        process = start(program, *flags, stdout=full, env={"PYTHONUNBUFFERED": ""})
    err = process.communicate()[1]
    assert err.startswith(b"error: [Errno 28]") and err.count(b"\n") == 1
    assert process.returncode == 2
