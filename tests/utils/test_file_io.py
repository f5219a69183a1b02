from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from iopath.common.file_io import PathHandler

from dinoengine.utils.file_io import local_path, path_manager


def test_a_local_path_is_itself_and_needs_no_iopath(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinoengine.utils.file_io.path_manager", lambda: pytest.fail("iopath was asked"))
    for path in ("/data/model.pth", "relative/model.pth", "C:\\model.pth", "name:with:colons"):
        assert local_path(path) == path


def test_other_schemes_go_through_the_handlers_of_the_one_manager(tmp_path: Path) -> None:
    class Handler(PathHandler):
        def _get_supported_prefixes(self) -> list[str]:
            return ["dinotest://"]

        def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
            return str(tmp_path / path.removeprefix("dinotest://"))

        def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> io.StringIO:
            return io.StringIO("remote")

    assert path_manager() is path_manager()
    path_manager().register_handler(Handler(), allow_override=True)
    assert local_path("dinotest://weights.pth") == str(tmp_path / "weights.pth")
    with path_manager().open("dinotest://x") as file:
        assert file.read() == "remote"


def test_importing_the_module_imports_no_iopath() -> None:
    code = "import sys, dinoengine.utils.file_io; sys.exit('iopath' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
