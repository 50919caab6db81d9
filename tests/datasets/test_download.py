"""Downloads from a local server that truncates, corrupts, stalls and refuses."""

import hashlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from datasets import download
from datasets.download import Files, fetch, get

CONTENT = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
PART = 100_000   # what a bad server sends of what it is asked for
WRONG = CONTENT[:200_000] + b"x" * 10 + CONTENT[200_010:]
LOGIN = b"<html>Please log in</html>"


class Server(BaseHTTPRequestHandler):
    """Misbehaves as the first part of the path says: /stalls/train-images-idx3-ubyte.gz."""

    def do_GET(self) -> None:   # noqa: N802
        how = self.path.split("/")[1]
        asked = self.headers.get("Range")
        self.server.seen.append((how, asked))
        content = {"corrupts": WRONG, "corrupts-and-truncates": WRONG, "login": LOGIN,
                   "login-no-length": LOGIN}.get(how, CONTENT)
        known = asked and how not in ("rangeless", "short")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if known else 0
        if how == "refuses":
            self.send_error(403)
        elif how == "silent":
            self.server.released.wait(5)
        elif how == "hangs-up":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif start >= len(content):
            self.send_error(416)
        else:
            self.answer(how, content, start)

    def answer(self, how: str, content: bytes, start: int) -> None:
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

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    """A server in a thread; .seen lists what was asked of it, .at(how) is an address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.seen, server.released = [], threading.Event()
        server.at = lambda how: f"http://127.0.0.1:{server.server_port}/{how}/"
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def download_from(server: ThreadingHTTPServer, path: Path,
                  *how: str) -> list[tuple[str, str | None]]:
    """Fetch CONTENT, check that nothing else is there, and return what the server was asked for."""
    addresses = [server.at(h) + path.name for h in how]
    fetch(path, addresses, len(CONTENT), MD5, timeout=0.3)
    assert path.read_bytes() == CONTENT and [*path.parent.iterdir()] == [path]
    return server.seen


@pytest.mark.parametrize("how", ["honest", "no-length"])
def test_a_whole_file(server, tmp_path, how):
    assert download_from(server, tmp_path / "new" / "file.gz", how) == [(how, None)]


@pytest.mark.parametrize("how", ["truncates", "stalls"])
def test_a_broken_transfer_is_taken_up_where_it_stopped(server, tmp_path, how):
    seen = download_from(server, tmp_path / "file.gz", how)
    assert seen == [(how, None), (how, "bytes=100000-"), (how, "bytes=200000-")]


@pytest.mark.parametrize("partial, how, asked", [
    (CONTENT[:123_456], "honest", [("honest", "bytes=123456-")]),
    (CONTENT, "refuses", []),
    (CONTENT[:100], "rangeless", [("rangeless", "bytes=100-")]),
], ids=["some of it", "all of it", "no ranges"])
def test_an_earlier_run_s_partial_file_is_gone_on_with(server, tmp_path, partial, how, asked):
    (tmp_path / "file.gz.partial").write_bytes(partial)
    assert download_from(server, tmp_path / "file.gz", how) == asked


@pytest.mark.parametrize("partial", [WRONG[:250_000], WRONG, CONTENT + b"x"],
                         ids=["some", "all", "too much"])
def test_a_wrong_partial_file_is_thrown_away(server, tmp_path, partial):
    (tmp_path / "file.gz.partial").write_bytes(partial)
    assert download_from(server, tmp_path / "file.gz", "honest")[-1] == ("honest", None)


@pytest.mark.parametrize("how", ["refuses", "silent", "hangs-up", "corrupts",
                                 "corrupts-and-truncates", "login", "login-no-length", "short"])
def test_a_mirror_steps_in(server, tmp_path, how):
    seen = download_from(server, tmp_path / "file.gz", how, "honest")
    assert seen[0][0] == how and seen[-1][0] == "honest"


def test_a_mirror_goes_on_with_what_another_sent(server, tmp_path):
    (tmp_path / "file.gz.partial").write_bytes(CONTENT[:100])
    seen = download_from(server, tmp_path / "file.gz", "confuses", "honest")
    assert seen[-1] == ("honest", "bytes=100-")


@pytest.mark.parametrize("how, complaint, left", [
    ("refuses", "403", None), ("silent", "timed out", None),
    ("hangs-up", "closed connection|timed out", None), ("login", "offers 26 bytes", None),
    ("login-no-length", "416", None), ("corrupts-and-truncates", "MD5", None),
    ("corrupts", f"MD5 {hashlib.md5(WRONG).hexdigest()} instead of {MD5}", None),
    ("short", "ended after 100,000 of 300,000", CONTENT[:PART]),
])
def test_no_bad_file_ever_gets_its_name(server, tmp_path, how, complaint, left):
    with pytest.raises(ValueError, match=complaint) as error:
        fetch(tmp_path / "file.gz", [server.at(how)], len(CONTENT), MD5, timeout=0.2)
    assert server.at(how) in str(error.value) and "\n" not in str(error.value)
    partial = tmp_path / "file.gz.partial"
    assert (partial.read_bytes() if partial.exists() else None) == left
    assert not (tmp_path / "file.gz").exists() and len(server.seen) < 10


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_size_and_checksum_are_both_verified(tmp_path, kind):
    path, checksum = tmp_path / "file", hashlib.new(kind, CONTENT).hexdigest()
    path.write_bytes(CONTENT)
    assert download.mismatch(path, len(CONTENT), checksum) is None
    assert "300,000 bytes instead of" in download.mismatch(path, len(CONTENT) + 1, checksum)
    assert f"{checksum} instead of" in download.mismatch(path, len(CONTENT), checksum[::-1])


# ---- data sets by name -------------------------------------------------------------------------

def publish(monkeypatch, *addresses: str) -> None:
    """Make svhn a published set of two files, each with CONTENT."""
    files = {name: (len(CONTENT), MD5) for name in ("train_32x32.mat", "test_32x32.mat")}
    monkeypatch.setitem(download.PUBLISHED, "svhn", Files(addresses, files))


@pytest.mark.parametrize("data_dir", ["", "svhn", "mnist"])
def test_a_set_goes_into_its_own_folder(server, tmp_path, monkeypatch, data_dir):
    publish(monkeypatch, server.at("refuses"), server.at("honest"))
    assert get("svhn", tmp_path / data_dir) == tmp_path / "svhn"
    names = sorted(path.name for path in (tmp_path / "svhn").iterdir())
    assert names == ["test_32x32.mat", "train_32x32.mat"]
    asked = len(server.seen)
    get("svhn", tmp_path)   # there already
    assert len(server.seen) == asked


def test_a_file_that_is_there_is_never_replaced(server, tmp_path, monkeypatch):
    publish(monkeypatch, server.at("honest"))
    path = tmp_path / "svhn" / "train_32x32.mat"
    path.parent.mkdir()
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match="train_32x32.mat is there, but is not the published"):
        get("svhn", tmp_path)
    assert path.read_bytes() == b"mine" and not server.seen


def test_without_a_network_one_line_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as free:   # nobody listens there once it is closed
        dead = f"http://127.0.0.1:{free.getsockname()[1]}/"
    publish(monkeypatch, dead + "a/", dead + "b/")
    with pytest.raises(ValueError, match="refused") as error:
        get("svhn", tmp_path)
    for part in (dead + "a/", dead + "b/", "train_32x32.mat, test_32x32.mat",
                 str(tmp_path / "svhn")):
        assert part in str(error.value)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, address", [
    ("celeba", "mmlab.ie.cuhk.edu.hk"), ("celebahq", "MM-CelebA-HQ-Dataset"),
    ("imagenet32", "image-net.org"), ("imagenet64", "image-net.org")])
def test_sets_behind_an_agreement_are_not_fetched(tmp_path, name, address):
    with pytest.raises(ValueError, match=f"{address}.* into {tmp_path / name}"):
        get(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_table_of_published_sets_is_whole():
    sums = [md5 for published in download.PUBLISHED.values() for _, md5 in published.files.values()]
    assert len(set(sums)) == len(sums) == 13
    assert all(len(bytes.fromhex(md5)) == 16 for md5 in sums)
    for published in download.PUBLISHED.values():
        assert all(a.startswith("http") and a.endswith("/") for a in published.addresses)
