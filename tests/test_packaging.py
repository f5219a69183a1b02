"""What pip, make and CI rely on."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dinoengine

ROOT = Path(__file__).resolve().parent.parent


def _setup_arguments() -> dict[str, ast.expr]:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "setup"]
    return {keyword.arg or "": keyword.value for keyword in calls[0].keywords}


def test_version_is_what_setup_reads() -> None:
    found = re.search(r'__version__ = "(.+)"', (ROOT / "dinoengine" / "__init__.py").read_text(encoding="utf-8"))
    assert found is not None
    assert found.group(1) == dinoengine.__version__


def test_every_third_party_import_is_a_dependency() -> None:
    required = ast.literal_eval(_setup_arguments()["install_requires"])
    extras = ast.literal_eval(_setup_arguments()["extras_require"])
    required += [line for extra, lines in extras.items() if extra != "test" for line in lines]
    names = {re.split(r"[ ;<>=]", line)[0].lower() for line in required}
    package_of = {"PIL": "pillow", "cv2": "opencv-python-headless", "sklearn": "scikit-learn", "yaml": "pyyaml"}
    imported = set()
    for path in (ROOT / "dinoengine").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    third_party = imported - sys.stdlib_module_names - {"dinoengine", "__future__"}
    assert {package_of.get(name, name).lower() for name in third_party} <= names


def test_ci_runs_make_test_and_make_knows_its_targets() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("train", "test", "lint", "docs", "clean", "help"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_make_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text(encoding="utf-8"))
    (tmp_path / "setup.py").touch()
    done = subprocess.run(["make", "train", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "needs Python 3.10 or newer" in done.stdout
    assert not (tmp_path / ".venv").exists()


def test_licence_is_apache() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.slow
def test_help_shows_examples() -> None:
    done = subprocess.run(
        [sys.executable, "tools/train_net.py", "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    for flag in ("--config-file", "--num-gpus", "--resume", "--eval-only", "torchrun"):
        assert flag in done.stdout
