"""One run makes a checkpoint at a time, and none makes its record another's."""

import fcntl
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

import train
from runtime import runs
from runtime.checkpoints import load_checkpoint
from runtime.files import locked
from tiny import arguments, refuse

ROOT = Path(__file__).resolve().parents[2]
BUSY = "another run is making it"


def assert_locked(path: Path) -> None:
    with pytest.raises(ValueError, match=f"cannot lock {path}: {BUSY}"), locked(path):
        pass


# ---- the lock ----------------------------------------------------------------------------------

def test_one_at_a_time_and_nothing_is_left(tmp_path):
    path = tmp_path / "new" / "folder" / "model.pt"
    for _ in range(2):
        with locked(path):
            assert_locked(path)
            with locked(path.with_name("other.pt")):
                pass
            assert_locked(path)   # though another was refused
        assert not list(tmp_path.iterdir())


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = ("import os, pathlib, sys; from runtime.files import locked\n"
            "with locked(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), 9)")
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], cwd=ROOT)
    assert run.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    with locked(tmp_path / "model.pt"):
        assert_locked(tmp_path / "model.pt")


def test_a_lock_on_a_deleted_file_does_not_count(tmp_path, monkeypatch):
    """The process before deletes the file between our opening and locking it."""
    flock, calls = fcntl.flock, []

    def delete_first(file, operation):
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / "model.pt.lock").unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", delete_first)
    with locked(tmp_path / "model.pt"):
        assert_locked(tmp_path / "model.pt")


def test_the_first_of_several_processes_locks(tmp_path, as_process):
    with locked(tmp_path / "model.pt"):
        as_process(1)
        with locked(tmp_path / "model.pt"):
            pass


def test_somebody_s_file_is_no_lock(tmp_path):
    path = tmp_path / "model.pt.lock"
    path.write_text("precious")
    with pytest.raises(ValueError, match=f"{path} is not empty"), locked(tmp_path / "model.pt"):
        pass
    assert path.read_text() == "precious"


def test_a_link_is_locked_where_it_leads(tmp_path):
    (tmp_path / "link.pt").symlink_to("model.pt")
    with locked(tmp_path / "link.pt"):
        assert_locked(tmp_path / "model.pt")


# ---- runs --------------------------------------------------------------------------------------

def test_a_second_run_of_one_target_is_refused(public, tmp_path, in_step):
    def run_again() -> None:
        for more in ([], ["--resume"], ["--overwrite"]):
            with pytest.raises(ValueError, match=f"private-eps3.pt: {BUSY}"):
                train.main(arguments(public, tmp_path, *more))
        train.main(arguments(public, tmp_path, "--eps", 4))   # another target in the same folder

    in_step(3, run_again)
    train.main(arguments(public, tmp_path))
    assert {path.stem for path in tmp_path.glob("*.pt")} == {"private-eps3", "private-eps4"}
    assert not list(tmp_path.glob("*.lock"))


@pytest.mark.parametrize("stage", ["public", "private"])
def test_a_public_model_is_made_by_one_run(public, tmp_path, in_step, stage):
    command = arguments(public, tmp_path, "--epochs", 1)[2:]   # without the public checkpoint

    def run_again() -> None:
        for more in (["--stage", "public"], ["--stage", "public", "--overwrite"], ["--eps", "4"]):
            with pytest.raises(ValueError, match=f"public.pt: {BUSY}"):
                train.main([*command, *more])

    in_step(3, run_again)   # after the two of the autoencoder
    train.main([*command, "--stage", stage])
    assert (tmp_path / "public.pt").exists() and not (tmp_path / "private-eps4.pt").exists()


def test_a_public_model_made_meanwhile_is_taken(public, tmp_path, monkeypatch, capsys):
    @contextmanager
    def wait_for(path):
        if path.name == "public.pt":
            path.write_bytes((public / "public.pt").read_bytes())
        yield

    monkeypatch.setattr(runs, "locked", wait_for)
    train.main(arguments(public, tmp_path, "--epochs", 1)[2:])
    assert "running the public stage" not in capsys.readouterr().out
    assert (tmp_path / "public.pt").read_bytes() == (public / "public.pt").read_bytes()


# ---- the record of a checkpoint that was moved -------------------------------------------------

def test_the_record_of_a_moved_checkpoint_is_kept(public, private, tmp_path, capsys):
    record = tmp_path / "private-eps3.privacy.json"
    record.write_bytes(private.with_suffix(".privacy.json").read_bytes())
    for more in ([], ["--resume"]):
        message = refuse(capsys, train.main, arguments(public, tmp_path, *more))
        assert f"{record} is the record of a checkpoint that is no longer here" in message
    assert [path.name for path in tmp_path.iterdir()] == [record.name]
    train.main(arguments(public, tmp_path, "--overwrite", "--epochs", 1))
    assert record.read_bytes() != private.with_suffix(".privacy.json").read_bytes()


def test_a_crash_between_record_and_checkpoint_is_resumed(public, tmp_path, in_step):
    def crash() -> None:
        raise RuntimeError("power cut")

    in_step(6, crash)
    with pytest.raises(RuntimeError):
        train.main(arguments(public, tmp_path))
    (tmp_path / "private-eps3.privacy.json").write_text('{"guarantee": ""}')
    train.main(arguments(public, tmp_path, "--resume"))
    assert load_checkpoint(tmp_path / "private-eps3.pt")[1]["ledger"][0]["steps"] == 12
