"""Images are known by their content: the public ones for good, the private ones until the end."""

import json
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import train
from datasets import Dataset
from runtime import fingerprint, runs
from tiny import arguments, refuse, write_images

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1)).astype(np.uint8)
DIGESTS = fingerprint.each_digest(IMAGES)
DATA = Dataset(IMAGES, np.array([0, 1, 0, 1]), ["a", "b"], ["one", "two", "three", "four"])


# ---- public images -----------------------------------------------------------------------------

def test_a_digest_is_of_images_in_any_order():
    def digest_of(images: np.ndarray) -> str:
        return fingerprint.set_digest(fingerprint.each_digest(images))

    others = [IMAGES[:3], IMAGES[[0, 1, 2, 2]], np.where(IMAGES == IMAGES[3, 0, 0], 0, IMAGES)]
    assert digest_of(IMAGES) == digest_of(IMAGES[[2, 0, 3, 1]])
    assert digest_of(IMAGES) not in map(digest_of, others)


OTHER = fingerprint.set_digest(DIGESTS[:3])


@pytest.mark.parametrize("digest, same_name, known", [
    (fingerprint.set_digest(DIGESTS), False, True), (OTHER, False, False),
    (OTHER, True, True),   # the folder has changed since
    (None, True, True), (None, False, False)])   # official weights
def test_known_are_equal_images_and_equal_names(digest, same_name, known):
    run = runs.PrivateRun(None, None, [], {}, public_digest=digest)
    assert run.knows(DIGESTS, same_name) == known


@pytest.mark.parametrize("behind", ["public", "private"])
def test_public_images_by_another_name_stay_public(public, private, tmp_path, capsys, behind):
    for k, path in enumerate(sorted((public / "public-images").rglob("*.png"))):
        copy = tmp_path / "copy" / "ba"[k % 2] / f"{k}.png"   # other labels, another order
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    checkpoint = public / "public.pt" if behind == "public" else private
    message = refuse(capsys, train.main, arguments(
        public, tmp_path / "out", "--public-checkpoint", checkpoint, "--eps", 9, "--private-data",
        tmp_path / "copy"))
    assert "without privacy" in message and not (tmp_path / "out").exists()


# ---- private images ----------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def no_state(state):
    """No test finds what another one remembered."""
    shutil.rmtree(state, ignore_errors=True)


@pytest.mark.parametrize("change", [
    {"images": IMAGES ^ (np.arange(4) == 2).astype(np.uint8).reshape(4, 1, 1, 1)},
    {"labels": np.array([0, 1, 1, 0])}, {"captions": ["one", "two", "three", "five"]},
    {"captions": None}])
def test_each_part_of_private_data_is_remembered(tmp_path, change):
    unfinished = tmp_path / "a.unfinished.pt"
    fingerprint.keep_data(unfinished, "name", DATA, DIGESTS, resumed=False)
    fingerprint.keep_data(unfinished, "name", replace(DATA), DIGESTS, resumed=True)
    changed = replace(DATA, **change)
    with pytest.raises(ValueError, match="the data have changed"):
        fingerprint.keep_data(unfinished, "name", changed, fingerprint.each_digest(changed.images),
                              resumed=True)


def test_key_and_digest_are_for_the_user_alone(tmp_path, state):
    found = []
    for name in "ab":
        handle = fingerprint.new_handle()
        fingerprint.keep_data(tmp_path / name, handle, DATA, DIGESTS, resumed=False)
        path = fingerprint.state_file(handle)
        assert path.parent == state and stat.S_IMODE(path.stat().st_mode) == 0o600
        found.append(json.loads(path.read_text()))
    assert len(found[0]["key"]) == 64 and found[0]["key"] != found[1]["key"]
    assert found[0]["digest"] != found[1]["digest"]   # equal data do not show


def test_a_new_run_takes_no_older_file_for_its_own(tmp_path):
    unfinished = tmp_path / "a.unfinished.pt"
    unfinished.write_bytes(b"of other data")
    fingerprint.keep_data(unfinished, "name", DATA, DIGESTS, resumed=False)
    assert not unfinished.exists()


def test_without_a_state_folder_runs_say_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    fingerprint.keep_data(tmp_path / "a.pt", "name", DATA, DIGESTS, resumed=False)
    assert "--resume will not notice" in capsys.readouterr().out


def test_a_resumed_run_has_the_images_it_began_with(public, tmp_path, in_step, capsys):
    def crash() -> None:
        raise RuntimeError("power cut")

    images = write_images(tmp_path / "images", [12, 12], seed=1)
    command = [*arguments(public, tmp_path / "out"), "--private-data", str(images)]
    in_step(3, crash)
    with pytest.raises(RuntimeError):
        train.main(command)
    unfinished = tmp_path / "out/private-eps3.unfinished.pt"
    state = fingerprint.state_file(fingerprint.handle_of(unfinished))
    content = json.loads(state.read_text())
    for path in (tmp_path / "out").iterdir():
        for secret in (content["key"], content["digest"]):
            written = path.read_bytes()
            assert secret.encode() not in written and bytes.fromhex(secret) not in written
    images.rename(tmp_path / "first")
    write_images(images, [12, 12], seed=2)
    capsys.readouterr()
    assert "the data have changed" in refuse(capsys, train.main, [*command, "--resume"])
    images.rename(tmp_path / "second")
    (tmp_path / "first").rename(images)
    train.main([*command, "--resume"])
    assert "could not be checked" not in capsys.readouterr().out and not state.exists()


def test_on_another_machine_data_go_unchecked(public, tmp_path, in_step, capsys, monkeypatch):
    def crash() -> None:
        raise RuntimeError("power cut")

    in_step(3, crash)
    with pytest.raises(RuntimeError):
        train.main(arguments(public, tmp_path / "out"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    capsys.readouterr()
    train.main(arguments(public, tmp_path / "out", "--resume"))
    assert capsys.readouterr().out.count("could not be checked") == 1
    assert (tmp_path / "out/private-eps3.pt").exists()


# ---- moved -------------------------------------------------------------------------------------

@pytest.fixture
def begun(tmp_path, public, in_step, monkeypatch) -> list[str]:
    """The command of a run that broke off: its folder and its data are ones of this folder."""
    def crash() -> None:
        raise RuntimeError("power cut")

    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", [12, 12], seed=1)
    shutil.copytree(public / "public-images", "letters")
    in_step(3, crash)
    command = [*arguments(public, "out"), "--private-data", "photos", "--public-data", "letters"]
    with pytest.raises(RuntimeError):
        train.main(command)
    return command


def stays(tmp_path: Path) -> list[str]:
    return ["--out", "./out", "--private-data", "./photos/", "--public-data", f"{tmp_path}/letters"]


def moves(tmp_path: Path) -> list[str]:
    (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "photos").rename(tmp_path / "pictures")
    (tmp_path / "letters").rename(tmp_path / "alphabet")
    return ["--out", "moved", "--private-data", "pictures", "--public-data", "alphabet"]


def links(tmp_path: Path) -> list[str]:
    (tmp_path / "link").symlink_to("photos")
    return ["--private-data", "link"]


@pytest.mark.parametrize("change", [stays, moves, links])
def test_a_run_goes_on_wherever_its_files_lie(tmp_path, begun, capsys, state, change):
    capsys.readouterr()
    command = [*begun, "--resume", *change(tmp_path)]
    train.main(command)
    printed = capsys.readouterr().out
    assert "going on with" in printed and "could not be checked" not in printed
    assert not list(state.iterdir())


@pytest.mark.parametrize("change", [stays, moves])
def test_a_moved_run_refuses_other_data(tmp_path, begun, capsys, change):
    command = [*begun, "--resume", *change(tmp_path)]
    folder = command[command.index("--resume") + 4]
    shutil.rmtree(folder)
    write_images(tmp_path / folder, [12, 12], seed=2)
    capsys.readouterr()
    assert "the data have changed" in refuse(capsys, train.main, command)


def test_on_another_machine_moved_data_are_refused(tmp_path, begun, capsys, state):
    shutil.rmtree(state)
    capsys.readouterr()
    message = refuse(capsys, train.main, [*begun, "--resume", *moves(tmp_path)])
    assert "made with --private-data photos, not pictures" in message
    assert "put the data, or a link to them, where they were" in message


def test_a_new_run_forgets_the_data_of_the_old_one(begun, state):
    [old] = state.iterdir()
    train.main([*begun, "--overwrite", "--epochs", "1"])
    assert not old.exists() and not list(state.iterdir())
