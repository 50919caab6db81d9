"""Downloads from a local server that truncates, corrupts, stalls and refuses; and the command line of data.py."""

import hashlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import download
from config import one_line_errors
from download import Files, fetch, get

CONTENT = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
PART = 100_000   # what a bad server sends of what it is asked for
WRONG = CONTENT[:200_000] + b"x" * 10 + CONTENT[200_010:]


class Server(BaseHTTPRequestHandler):
    """Misbehaves as the first part of the path says: /stalls/train-images-idx3-ubyte.gz."""

    def do_GET(self):
        how = self.path.split("/")[1]
        asked = self.headers.get("Range")
        self.server.seen.append((how, asked))
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and how not in ("rangeless", "short") else 0
        content = {"corrupts": WRONG, "corrupts-and-truncates": WRONG, "login": b"<html>Please log in</html>",
                   "login-no-length": b"<html>Please log in</html>"}.get(how, CONTENT)
        if how == "refuses":
            self.send_error(403)
        elif how == "silent":
            self.server.released.wait(5)
        elif how == "hangs-up":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif start >= len(content):
            self.send_error(416)
        else:
            self.send_response(206 if start else 200)
            if start:
                told = 0 if how == "confuses" else start
                self.send_header("Content-Range", f"bytes {told}-{len(content) - 1}/{len(content)}")
            if not how.endswith("no-length"):
                self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            bad = how in ("truncates", "stalls", "short", "corrupts-and-truncates")
            self.wfile.write(content[start:start + PART] if bad else content[start:])
            self.wfile.flush()
            if how == "stalls" and start + PART < len(content):
                self.server.released.wait(5)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server in a thread; .seen lists what was asked of it, .at(how) is an address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.seen, server.released = [], threading.Event()
        server.at = lambda how: f"http://127.0.0.1:{server.server_port}/{how}/file.gz"
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def download_from(server, path: Path, *how: str) -> list[tuple[str, str | None]]:
    """Fetch CONTENT, check that it is there and nothing else is, and return what the server was asked for."""
    fetch(path, [server.at(h) for h in how], len(CONTENT), MD5, timeout=0.3)
    assert path.read_bytes() == CONTENT and [p.name for p in path.parent.iterdir()] == [path.name]
    return server.seen


def test_a_whole_file(server, tmp_path):
    assert download_from(server, tmp_path / "new" / "file.gz", "honest") == [("honest", None)]


@pytest.mark.parametrize("how", ["truncates", "stalls"])
def test_a_broken_transfer_is_taken_up_where_it_stopped(server, tmp_path, how):
    seen = download_from(server, tmp_path / "file.gz", how)
    assert seen == [(how, None), (how, "bytes=100000-"), (how, "bytes=200000-")]


def test_an_earlier_runs_partial_file_is_gone_on_with(server, tmp_path):
    (tmp_path / "file.gz.partial").write_bytes(CONTENT[:123_456])
    assert download_from(server, tmp_path / "file.gz", "honest") == [("honest", "bytes=123456-")]


@pytest.mark.parametrize("partial", [WRONG[:250_000], WRONG, CONTENT + b"x"], ids=["some", "all", "too much"])
def test_a_wrong_partial_file_is_thrown_away(server, tmp_path, partial):
    (tmp_path / "file.gz.partial").write_bytes(partial)
    assert download_from(server, tmp_path / "file.gz", "honest")[-1] == ("honest", None)


def test_a_complete_partial_file_needs_no_server(server, tmp_path):
    (tmp_path / "file.gz.partial").write_bytes(CONTENT)
    assert download_from(server, tmp_path / "file.gz", "refuses") == []


def test_a_server_without_ranges_sends_all_anew(server, tmp_path):
    (tmp_path / "file.gz.partial").write_bytes(CONTENT[:100])
    assert download_from(server, tmp_path / "file.gz", "rangeless") == [("rangeless", "bytes=100-")]


def test_a_server_that_tells_no_length(server, tmp_path):
    download_from(server, tmp_path / "file.gz", "no-length")


@pytest.mark.parametrize("how", ["refuses", "silent", "hangs-up", "corrupts", "corrupts-and-truncates", "login",
                                 "login-no-length", "short"])
def test_a_mirror_steps_in(server, tmp_path, how):
    seen = download_from(server, tmp_path / "file.gz", how, "honest")
    assert seen[0][0] == how and seen[-1][0] == "honest"


def test_a_mirror_goes_on_with_what_another_sent(server, tmp_path):
    (tmp_path / "file.gz.partial").write_bytes(CONTENT[:100])
    assert download_from(server, tmp_path / "file.gz", "confuses", "honest")[-1] == ("honest", "bytes=100-")


@pytest.mark.parametrize("how, complaint, left", [
    ("refuses", "403", None), ("silent", "timed out", None), ("hangs-up", "closed connection", None),
    ("login", "offers 26 bytes", None), ("login-no-length", "416", None),
    ("corrupts", f"MD5 {hashlib.md5(WRONG).hexdigest()} instead of {MD5}", None),
    ("corrupts-and-truncates", "MD5", None), ("short", "ended after 100,000 of 300,000", CONTENT[:PART]),
])
def test_no_bad_file_ever_gets_its_name(server, tmp_path, how, complaint, left):
    with pytest.raises(ValueError, match=complaint) as error:
        fetch(tmp_path / "file.gz", [server.at(how)], len(CONTENT), MD5, timeout=0.2)
    assert server.at(how) in str(error.value) and "\n" not in str(error.value)
    partial = tmp_path / "file.gz.partial"
    assert (partial.read_bytes() if partial.exists() else None) == left
    assert not (tmp_path / "file.gz").exists() and len(server.seen) < 10


@pytest.mark.parametrize("size, md5", [(len(CONTENT) + 1, MD5), (len(CONTENT), MD5[::-1])])
def test_size_and_checksum_are_both_verified(tmp_path, size, md5):
    (tmp_path / "file").write_bytes(CONTENT)
    assert download.mismatch(tmp_path / "file", len(CONTENT), MD5) is None
    assert "instead of" in download.mismatch(tmp_path / "file", size, md5)


# ---- data sets by name -----------------------------------------------------------------------------

def small_set(monkeypatch, *addresses: str) -> None:
    """A published set of two files."""
    files = {"train_32x32.mat": (len(CONTENT), MD5), "test_32x32.mat": (len(CONTENT), MD5)}
    monkeypatch.setitem(download.PUBLISHED, "svhn", Files(addresses, files))


@pytest.mark.parametrize("data_dir", ["", "svhn", "mnist"])
def test_get_puts_the_files_where_load_looks_for_them(server, tmp_path, monkeypatch, capsys, data_dir):
    small_set(monkeypatch, server.at("refuses").removesuffix("file.gz"), server.at("honest").removesuffix("file.gz"))
    data.main(["--get", "svhn", "--data-dir", str(tmp_path / data_dir)])
    assert sorted(p.name for p in (tmp_path / "svhn").iterdir()) == ["test_32x32.mat", "train_32x32.mat"]
    assert f"svhn is in {tmp_path / 'svhn'}" in capsys.readouterr().out
    asked = len(server.seen)
    get("svhn", tmp_path)   # there already
    assert len(server.seen) == asked


def test_a_file_that_is_there_is_never_replaced(server, tmp_path, monkeypatch):
    small_set(monkeypatch, server.at("honest").removesuffix("file.gz"))
    path = tmp_path / "svhn" / "train_32x32.mat"
    path.parent.mkdir()
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match="train_32x32.mat is there, but is not the published file.*left as it is"):
        get("svhn", tmp_path)
    assert path.read_bytes() == b"mine" and not server.seen


def refuse(capsys, *argv: str) -> str:
    """Run data.py, which must exit with code 2 and one line; returns that line."""
    with pytest.raises(SystemExit) as stop, one_line_errors():
        data.main([str(a) for a in argv])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    return message


def test_without_a_network_one_line_says_what_to_put_where(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as free:   # nobody listens there once it is closed
        dead = f"http://127.0.0.1:{free.getsockname()[1]}/"
    small_set(monkeypatch, dead + "a/", dead + "b/")
    message = refuse(capsys, "--get", "svhn", "--data-dir", tmp_path)
    for part in (dead + "a/", dead + "b/", "train_32x32.mat", "test_32x32.mat", str(tmp_path / "svhn"), "refused"):
        assert part in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, address", [
    ("celeba", "mmlab.ie.cuhk.edu.hk"), ("celebahq", "MM-CelebA-HQ-Dataset"), ("imagenet32", "image-net.org"),
    ("imagenet64", "image-net.org"),
])
def test_sets_behind_an_agreement_are_not_fetched(tmp_path, capsys, name, address):
    message = refuse(capsys, "--get", name, "--data-dir", tmp_path)
    assert address in message and str(tmp_path / name) in message and not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, complaint", [
    (["--get", "nonsense"], "unknown data set 'nonsense': give one of mnist, fashion-mnist"), ([], "nothing to do"),
    (["--show", "nonsense"], "unknown data 'nonsense'"), (["--show", "letters", "--split", "all"], "split 'all'"),
])
def test_bad_input_is_refused(capsys, arguments, complaint):
    assert complaint in refuse(capsys, *arguments)


def test_the_table_of_published_sets_is_whole():
    assert set(download.NAMES) == {"mnist", "fashion-mnist", "emnist-letters", "svhn", "cifar10", "cifar100", "celeba",
                                   "celebahq", "imagenet32", "imagenet64"}
    sums = [md5 for published in download.PUBLISHED.values() for _, md5 in published.files.values()]
    assert len(set(sums)) == len(sums) == 13 and all(len(bytes.fromhex(md5)) == 16 for md5 in sums)
    for published in download.PUBLISHED.values():
        assert all(a.startswith("http") and a.endswith("/") for a in published.addresses)


# ---- --show ----------------------------------------------------------------------------------------

def test_show_writes_a_labelled_grid(tmp_path, capsys):
    for split, level in (("train", 50), ("test", 200)):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (level, 0, 0)).save(tmp_path / "pets" / split / name / "0.png")
    data.main(["--show", str(tmp_path / "pets"), "--split", "test", "--out", str(tmp_path / "grid.png")])
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.width > 10 * 32 and picture.height > 2 * 32
        assert picture.getpixel((picture.width - 20, 50)) == (200, 0, 0)   # in colour, of the test images
    assert f"wrote {tmp_path / 'grid.png'}" in capsys.readouterr().out


def test_show_names_its_picture_after_source_and_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(data, "COUNTS", {"letters": {"test": 60}})
    data.main(["--show", "letters", "--split", "test"])
    with Image.open("runs/letters-test.png") as picture:
        assert picture.height > 10 * 32


def test_show_writes_captions_beside_their_images(tmp_path):
    pets = tmp_path / "pets"
    pets.mkdir()
    widths = []
    for text in ("cat", "a cat that sleeps on a red sofa"):
        Image.new("RGB", (32, 32)).save(pets / "0.png")
        (pets / "metadata.jsonl").write_text(f'{{"file_name": "0.png", "text": "{text}"}}\n')
        panel = data.show(str(pets), "train", "data", 32, 3)
        assert panel[1].shape == (1, 1, 32, 32, 3) and panel[2] == [text]
        data.main(["--show", str(pets), "--out", str(tmp_path / "grid.png")])
        with Image.open(tmp_path / "grid.png") as picture:
            widths.append(picture.width)
    assert widths[1] > widths[0] + 60
