from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from dinoengine.utils import url_handlers
from dinoengine.utils.file_io import is_file, is_url, local_folder, local_path, path_manager, read_bytes
from tests.web import Server, serving


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(url_handlers.time, "sleep", lambda seconds: None)
    (tmp_path / "www").mkdir()
    with serving(tmp_path / "www") as server:
        yield server


def _put(tmp_path: Path, name: str, content: bytes = b"content") -> None:
    (tmp_path / "www" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "www" / name).write_bytes(content)


@pytest.mark.parametrize(
    "path, expected",
    [("s3://b/x", True), ("http://h", True), ("/a/b://c", False), ("a:b", False), ("C:\\x", False), ("://x", False)],
)
def test_what_is_a_url(path: str, expected: bool) -> None:
    assert is_url(path) is expected


def test_http_with_any_name(tmp_path: Path, server: Server) -> None:
    _put(tmp_path, "a b/ü %41.jpg")
    for name in ("a b/ü %2541.jpg", "a%20b/%C3%BC%20%2541.jpg"):
        assert read_bytes(f"{server.url}/{name}") == b"content"
        assert is_file(f"{server.url}/{name}")
    with path_manager().open(f"{server.url}/a b/ü %2541.jpg") as file:
        assert file.read() == "content"


def test_what_is_not_there(server: Server) -> None:
    assert not is_file(f"{server.url}/none")
    with pytest.raises(FileNotFoundError, match=r"http://127\.0\.0\.1:\d+/none does not exist \(HTTP status 404\)"):
        read_bytes(f"{server.url}/none")
    assert server.requests == [("HEAD", "/none"), ("GET", "/none")]  # once: the answer would be the same


def test_a_server_without_head_is_believed(server: Server) -> None:
    server.without_head = True
    assert is_file(f"{server.url}/none")


def test_a_moment_of_weakness_is_waited_out(tmp_path: Path, server: Server) -> None:
    _put(tmp_path, "x")
    server.weak["/x"] = 2
    assert read_bytes(f"{server.url}/x") == b"content"
    server.weak["/x"] = 3
    with pytest.raises(OSError, match=r"/x cannot be read: HTTP Error 503"):
        read_bytes(f"{server.url}/x")


def test_an_answer_that_ends_early_is_no_file(tmp_path: Path, server: Server) -> None:
    _put(tmp_path, "x", b"0123456789")
    server.short.add("/x")
    for read in (read_bytes, local_path):
        with pytest.raises(OSError, match=r"/x cannot be read: IncompleteRead"):
            read(f"{server.url}/x")
    server.short.clear()
    assert Path(local_path(f"{server.url}/x")).read_bytes() == b"0123456789"


def test_a_server_that_says_nothing_is_left_after_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_handlers, "TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(url_handlers.time, "sleep", lambda seconds: None)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(OSError, match="cannot be read: .*timed out"):
            read_bytes(f"http://127.0.0.1:{silent.getsockname()[1]}/x")
        assert time.monotonic() - start < 30


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_handlers.time, "sleep", lambda seconds: None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(OSError, match=rf"http://127\.0\.0\.1:{port}/x cannot be read: .*refused"):
        is_file(f"http://127.0.0.1:{port}/x")


def test_a_local_copy_is_fetched_once_and_is_of_the_whole_url(tmp_path: Path, server: Server) -> None:
    _put(tmp_path, "a.tar")
    _put(tmp_path, "b/a.tar", b"another")
    for _ in range(2):
        assert Path(local_path(f"{server.url}/a.tar")).read_bytes() == b"content"
        assert Path(local_path(f"{server.url}/b/a.tar")).read_bytes() == b"another"
    assert Path(local_path(f"{server.url}/a.tar?version=2")).read_bytes() == b"content"
    assert [path for _, path in server.requests] == ["/a.tar", "/b/a.tar", "/a.tar?version=2"]


def test_protocols_of_fsspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.pipe("/url_handlers/a/1.jpg", b"one")
    memory.pipe("/url_handlers/2.jpg", b"two")
    assert read_bytes("memory://url_handlers/a/1.jpg") == b"one"
    assert Path(local_path("memory://url_handlers/2.jpg")).read_bytes() == b"two"
    assert (is_file("memory://url_handlers/2.jpg"), is_file("memory://url_handlers/3.jpg")) == (True, False)
    assert sorted(url_handlers.files_below("memory://url_handlers/")) == ["2.jpg", "a/1.jpg"]
    for read in (read_bytes, local_path):
        with pytest.raises(FileNotFoundError):
            read("memory://url_handlers/3.jpg")


def test_what_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    for use in (read_bytes, is_file, url_handlers.files_below):
        with pytest.raises(
            ValueError, match=r"s3://b/x needs .* \(Install s3fs to access S3\).*pip install 'dinoengine\[s3\]'"
        ):
            use("s3://b/x")  # type: ignore[operator]


def test_an_unknown_protocol_is_no_local_file() -> None:
    for use in (read_bytes, is_file, local_path):
        with pytest.raises(ValueError, match=r"Nothing here reads nowhere:// \(nowhere://x\)"):
            use("nowhere://x")  # type: ignore[operator]


def test_http_cannot_list() -> None:
    with pytest.raises(ValueError, match=r"http://h/p cannot be listed.*list:/p/files\.txt with root=URL"):
        url_handlers.files_below("http://h/p")


def test_a_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/data/me")
    assert local_folder("~/x") == "/data/me/x"
    with pytest.raises(ValueError, match=r"s3://b is a URL, and this dataset reads folders of this machine"):
        local_folder("s3://b")
