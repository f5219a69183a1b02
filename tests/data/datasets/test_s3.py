"""Datasets in a bucket of a server on 127.0.0.1."""

from __future__ import annotations

import importlib.util
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoengine.data import UnreadableImageError, build_dataset

MISSING = [name for name in ("moto", "flask", "flask_cors", "s3fs") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install 'dinoengine[test]'")


def _png(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((3, 2), value, dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def _shard(*values: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for value in values:
            info = tarfile.TarInfo(f"{value}.png")
            info.size = len(_png(value))
            tar.addfile(info, io.BytesIO(_png(value)))
    return out.getvalue()


def _values(dataset: Any) -> list[int]:
    return [int(np.asarray(dataset.load(i))[0, 0]) for i in range(len(dataset))]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file system of the server, with an empty bucket "data", by the environment that docs/data.md names."""
    import s3fs

    for name in ("FVCORE_CACHE", "DINOENGINE_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()  # connections of the test before
    system = s3fs.S3FileSystem()
    system.mkdir("data")
    yield system
    system.rm("data", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_folder(bucket: Any) -> None:
    for value, name in enumerate(("b/2 é#?.png", "a/x/1.PNG", "a/.hidden.png", "a/notes.txt")):
        bucket.pipe(f"data/photos/{name}", _png(value))
    dataset = build_dataset("folder:s3://data/photos")
    assert [dataset.describe(i) for i in range(len(dataset))] == ["s3://data/photos/a/x/1.PNG", "s3://data/photos/b/2 é#?.png"]  # fmt: skip
    assert (_values(dataset), dataset.class_names, dataset.labels().tolist()) == ([1, 0], ["a", "b"], [0, 1])
    bucket.rm("data/photos/a/x/1.PNG")
    with pytest.raises(UnreadableImageError, match=r"s3://data/photos/a/x/1\.PNG is not a readable image"):
        dataset.load(0)


def test_a_list(bucket: Any, tmp_path: Path) -> None:
    bucket.pipe("data/d/a b.png", _png(7))
    bucket.pipe("data/l.csv", b"path,label\nd/a b.png,x\ns3://data/d/a b.png,y\n")
    dataset = build_dataset("list:s3://data/l.csv")
    assert (_values(dataset), dataset.class_names) == ([7, 7], ["x", "y"])
    (tmp_path / "l.txt").write_text("d/a b.png\nd/none.png\n")
    with pytest.raises(FileNotFoundError, match="1 of the 2 files(.|\n)*s3://data/d/none.png"):
        build_dataset(f"list:{tmp_path}/l.txt:root=s3://data")


def test_shards(bucket: Any) -> None:
    for number in range(3):
        bucket.pipe(f"data/s-{number}.tar", _shard(10 * number, 10 * number + 1))
    for pattern in ("s-{0..2}.tar", "s-*.tar"):
        assert _values(build_dataset(f"wds:s3://data/{pattern}")) == [0, 1, 10, 11, 20, 21]
    with pytest.raises(FileNotFoundError, match="1 of 4 shards are missing(.|\n)*s3://data/s-3.tar"):
        build_dataset("wds:s3://data/s-{0..3}.tar")


def test_what_is_not_there(bucket: Any) -> None:
    with pytest.raises(FileNotFoundError, match="s3://data/none holds no image"):
        build_dataset("folder:s3://data/none")
    with pytest.raises(FileNotFoundError, match="folder:s3://nobody.*bucket does not exist"):
        build_dataset("folder:s3://nobody/photos")
    with pytest.raises(FileNotFoundError, match="list of images s3://data/l.txt does not exist"):
        build_dataset("list:s3://data/l.txt")
