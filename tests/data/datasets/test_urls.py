"""Datasets whose files lie behind URLs: list, wds and folder."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.registry import known_implementations
from PIL import Image

from dinoengine.data import UnreadableImageError, build_dataset
from dinoengine.utils import url_handlers
from dinoengine.utils.file_io import path_manager
from tests.web import Server, serving


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DINOENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(url_handlers.time, "sleep", lambda seconds: None)
    (tmp_path / "www").mkdir()
    with serving(tmp_path / "www") as server:
        yield server


def _png(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((3, 2), value, dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def _values(dataset: Any) -> list[int]:
    return [int(np.asarray(dataset.load(i))[0, 0]) for i in range(len(dataset))]


def test_a_list_behind_a_url(tmp_path: Path, server: Server) -> None:
    www = tmp_path / "www"
    (www / "d").mkdir()
    (www / "d" / "a b#1.png").write_bytes(_png(1))
    (www / "2.png").write_bytes(_png(2))
    (tmp_path / "3.png").write_bytes(_png(3))
    (www / "l.csv").write_text(f"path,label\nd/a b#1.png,x\n{server.url}/2.png,y\n{tmp_path}/3.png,x\n")
    dataset = build_dataset(f"list:{server.url}/l.csv?v=1")
    assert (_values(dataset), dataset.labels().tolist()) == ([1, 2, 3], [0, 1, 0])
    assert dataset.describe(0) == f"{server.url}/d/a%20b%231.png"
    assert _values(pickle.loads(pickle.dumps(dataset))) == [1, 2, 3]


def test_a_list_of_this_machine_with_a_root_behind_a_url(tmp_path: Path, server: Server) -> None:
    (tmp_path / "www" / "1.png").write_bytes(_png(1))
    (tmp_path / "l.txt").write_text("1.png\n")
    assert _values(build_dataset(f"list:{tmp_path}/l.txt:root={server.url}/")) == [1]


def test_of_many_urls_a_hundred_are_asked_for(tmp_path: Path, server: Server) -> None:
    (tmp_path / "l.txt").write_text("".join(f"{i}.png\n" for i in range(1000)))
    with pytest.raises(
        FileNotFoundError, match=r"100 of the 100 files .*\n(  http://.*/\d+0\.png\n?|.*/0\.png\n?){5}$"
    ):
        build_dataset(f"list:{tmp_path}/l.txt:root={server.url}")
    assert len(server.requests) == 100
    dataset = build_dataset(f"list:{tmp_path}/l.txt:root={server.url}:check=false")
    with pytest.raises(UnreadableImageError, match=r"/7\.png is not a readable image \(.*does not exist"):
        dataset.load(7)


def test_a_list_that_is_not_there(server: Server) -> None:
    with pytest.raises(FileNotFoundError, match=r"list of images http://.*/l\.txt does not exist"):
        build_dataset(f"list:{server.url}/l.txt")


def _tar(path: Path, *values: int) -> None:
    with tarfile.open(path, "w") as tar:
        for value in values:
            info = tarfile.TarInfo(f"{value}.png")
            info.size = len(_png(value))
            tar.addfile(info, io.BytesIO(_png(value)))


def test_shards_behind_a_url_are_fetched_once(tmp_path: Path, server: Server) -> None:
    for shard in (0, 1):
        _tar(tmp_path / "www" / f"s-{shard}.tar", 2 * shard, 2 * shard + 1)
    for _ in range(2):
        dataset = build_dataset(f"wds:{server.url}/s-{{0..1}}.tar")
        assert _values(dataset) == [0, 1, 2, 3]
    assert sorted(server.requests) == [("GET", "/s-0.tar"), ("GET", "/s-1.tar")]


def test_missing_and_short_shards(tmp_path: Path, server: Server) -> None:
    _tar(tmp_path / "www" / "s-0.tar", 1)
    with pytest.raises(FileNotFoundError, match=r"7 of 8 shards are missing\. .*\n(  http://.*s-\d\.tar\n?){5}$"):
        build_dataset(f"wds:{server.url}/s-{{0..7}}.tar")
    _tar(tmp_path / "www" / "t.tar", 1)
    server.short.add("/t.tar")
    with pytest.raises(OSError, match=r"/t\.tar cannot be read: IncompleteRead"):
        build_dataset(f"wds:{server.url}/t.tar")


def test_a_folder_that_fsspec_lists() -> None:
    memory = fsspec.filesystem("memory")
    for path, content in {"b/1.png": _png(1), "a/x/2.PNG": _png(2), "a/n.txt": b"", ".h/3.png": _png(3)}.items():
        memory.pipe(f"/test_urls/{path}", content)
    dataset = build_dataset("folder:memory://test_urls/")
    assert [dataset.describe(i) for i in range(2)] == ["memory://test_urls/a/x/2.PNG", "memory://test_urls/b/1.png"]
    assert (_values(dataset), dataset.class_names) == ([2, 1], ["a", "b"])
    assert _values(pickle.loads(pickle.dumps(dataset))) == [2, 1]
    with pytest.raises(FileNotFoundError, match="memory://none holds no image; found nothing"):
        build_dataset("folder:memory://none")


@pytest.mark.parametrize(
    "text, message",
    [
        ("folder:http://127.0.0.1/p", "http has no such request"),
        ("folder:nowhere://p", "nowhere://p cannot be read: Protocol not known"),
        ("list:nowhere://p.txt", "Nothing here reads nowhere://"),
        ("wds:nowhere://p.tar", "Nothing here reads nowhere://"),
        ("ImageNet:root=s3://b", "s3://b is a URL, and this dataset reads folders of this machine"),
        ("ImageNet22k:root=s3://b", "is a URL"),
        ("voc2007:root=s3://b", "is a URL"),
        ("masks:s3://b", "is a URL"),
    ],
)
def test_what_cannot_be_read_says_why(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_dataset(text)


def test_shards_by_a_pattern(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        info = tarfile.TarInfo("1.png")
        info.size = len(_png(1))
        tar.addfile(info, io.BytesIO(_png(1)))
    memory = fsspec.filesystem("memory")
    for number in (3, 1, 2):
        memory.pipe(f"/test_shards/s-{number}.tar", (tmp_path / "1.tar").read_bytes())
    dataset = build_dataset("wds:memory://test_shards/s-*.tar")
    assert _values(dataset) == [1, 1, 1]
    assert [path.rpartition("-s-")[2] for path in dataset.shards] == ["1.tar", "2.tar", "3.tar"]
    with pytest.raises(FileNotFoundError, match=r"1 of 1 shards are missing(.|\n)*test_shards/t-\*\.tar"):
        build_dataset("wds:memory://test_shards/t-*.tar")
    with pytest.raises(ValueError, match=r"has a '\*', and http has no request to list .* shard-\{000\.\.099\}\.tar"):
        build_dataset(f"wds:{server.url}/s-*.tar")


class _NoLogin(fsspec.AbstractFileSystem):
    """A file system that refuses as botocore does: by an error that is no OSError."""

    protocol = "nologin"

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        raise RuntimeError("Unable to locate credentials")

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        raise RuntimeError("Unable to locate credentials")

    _open = glob = find = info


@pytest.mark.parametrize("text", ["folder:nologin://b", "list:nologin://b/l.txt", "wds:nologin://b/1.tar", "wds:nologin://b/*.tar"])  # fmt: skip
def test_a_refused_login_is_no_missing_file(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    monkeypatch.setitem(known_implementations, "nologin", {"class": f"{__name__}._NoLogin"})
    path_manager.cache_clear()
    with pytest.raises(OSError, match=r"nologin://b.* cannot be read: Unable to locate credentials") as failed:
        build_dataset(text)
    assert not isinstance(failed.value, FileNotFoundError)
    path_manager.cache_clear()
