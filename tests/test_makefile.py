"""Makefile, CI and setup.py at work: with a stand-in for Python that notes what it is asked, nothing is installed."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import dinoengine
from dinoengine.config import get_cfg, validate
from dinoengine.engine import config_loading, default_argument_parser, load_config
from tests.test_packaging import ROOT, _setup_arguments

# Notes its arguments in calls.log; "makes" a venv of copies of itself; fails where FAIL matches the call.
STAND_IN = """#!/bin/sh
name=$(basename "$0")
echo "$name $*" >> "$CALLS"
[ "$1" = --version ] && echo "Python 3.12.0"
case "$name $*" in
  *"${FAIL:-nothing fails}"*) exit 3 ;;
  *"-m venv .venv") mkdir -p .venv/bin && for tool in python ruff mypy; do cp "$0" .venv/bin/$tool; done ;;
esac
"""


class Checkout:
    """A folder with the project's Makefile in which every program is the stand-in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls_log = folder / "calls.log"
        for name in ("Makefile", "setup.py"):
            (folder / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
        self.python = folder / "python-stand-in"
        self.python.write_text(STAND_IN, encoding="utf-8")
        self.python.chmod(0o755)

    def make(self, *words: str, fail: str = "nothing fails") -> tuple[int, str, list[str]]:
        """(exit code, standard output, calls without the version check)."""
        self.calls_log.write_text("")
        done = subprocess.run(
            ["make", *words, f"PYTHON={self.python}"],
            cwd=self.folder,
            env={**_clean_environment(), "CALLS": str(self.calls_log), "FAIL": fail},
            capture_output=True,
            text=True,
        )
        calls = self.calls_log.read_text().splitlines()
        return done.returncode, done.stdout, [c for c in calls if " -c " not in c and "--version" not in c]


def _clean_environment() -> dict[str, str]:
    """Without what an outer make passes on: these tests run under ``make test``."""
    return {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTEST_ARGS")}


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def _installs(calls: list[str]) -> list[str]:
    return [call for call in calls if " pip install " in call]


def test_make_train_installs_once_and_runs_the_quickstart(checkout: Checkout) -> None:
    code, output, calls = checkout.make("train")
    assert code == 0
    assert [c.split()[0:3] for c in calls[:2]] == [["python-stand-in", "-m", "venv"], ["python", "-m", "pip"]]
    command = "tools/train_net.py --config-file configs/quickstart/digits.yaml --num-gpus 0 --resume"
    assert calls[2:] == [f"python {command} OUTPUT_DIR output/quickstart"]
    announced, installed = output.index("about 5.4 GB"), output.index("pip install")
    assert announced < installed  # the user knows what the wait is for

    code, output, calls = checkout.make("train")
    assert code == 0
    assert len(calls) == 1
    assert "5.4 GB" not in output


def test_a_change_of_setup_installs_again(checkout: Checkout) -> None:
    checkout.make("train")
    later = (checkout.folder / ".venv" / "installed").stat().st_mtime + 10
    os.utime(checkout.folder / "setup.py", (later, later))
    _, _, calls = checkout.make("train")
    assert len(_installs(calls)) == 1
    assert not any(" venv " in call for call in calls)


def test_a_failed_install_is_repeated(checkout: Checkout) -> None:
    code, _, calls = checkout.make("train", fail="pip install")
    assert code != 0
    assert not any("train_net" in call for call in calls)
    assert not (checkout.folder / ".venv" / "installed").exists()
    code, _, calls = checkout.make("train")
    assert code == 0
    assert len(_installs(calls)) == 1


def test_a_failed_venv_says_what_to_do_and_leaves_nothing(checkout: Checkout) -> None:
    code, output, calls = checkout.make("train", fail="-m venv")
    assert code != 0
    assert "python3-venv" in output
    assert not (checkout.folder / ".venv").exists()
    assert _installs(calls) == []


def test_make_test_lints_types_and_tests_in_this_order(checkout: Checkout) -> None:
    code, _, calls = checkout.make("test", "PYTEST_ARGS=-x --co")
    assert code == 0
    assert ".[test]" in " ".join(_installs(calls))
    assert calls[-4:] == [
        "ruff check .",
        "ruff format --check .",
        "mypy ",
        "python -m pytest -n 2 --dist loadfile -x --co",
    ]


@pytest.mark.parametrize("step", ["ruff check", "ruff format", "mypy", "-m pytest"])
def test_each_step_of_make_test_can_fail_it(checkout: Checkout, step: str) -> None:
    code, _, calls = checkout.make("test", fail=step)
    assert code != 0
    assert step in calls[-1]  # and nothing runs after it


def test_make_alone_prints_every_target(checkout: Checkout) -> None:
    code, output, calls = checkout.make()
    assert (code, calls) == (0, [])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^\.PHONY: (.+)", makefile, re.MULTILINE)[0].split()) - {"help"}
    assert {line.split()[1] for line in output.splitlines() if line.startswith("make ")} == targets


def test_make_clean_keeps_results(checkout: Checkout) -> None:
    checkout.make("train")
    (checkout.folder / "output").mkdir()
    (checkout.folder / "output" / "model_final.pth").touch()
    code, _, _ = checkout.make("clean")
    assert code == 0
    assert not (checkout.folder / ".venv").exists()
    assert (checkout.folder / "output" / "model_final.pth").exists()


@pytest.mark.parametrize("exit_code", [0, 7])
def test_ci_runs_from_anywhere_and_passes_the_exit_code_on(tmp_path: Path, exit_code: int) -> None:
    ci = tmp_path / "clone" / ".ci" / "run"
    ci.parent.mkdir(parents=True)
    ci.write_text((ROOT / ".ci" / "run").read_text(encoding="utf-8"), encoding="utf-8")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "make").write_text(f'#!/bin/sh\necho "make $* in $(pwd -P)"\nexit {exit_code}\n')
    (programs / "make").chmod(0o755)
    environment = {**_clean_environment(), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(ci)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == exit_code
    assert done.stdout == f"make test in {ci.parent.parent.resolve()}\n"


def test_every_folder_with_code_is_packaged() -> None:
    folders = {p.parent for p in (ROOT / "dinoengine").rglob("*.py")}
    assert [f for f in folders if not (f / "__init__.py").exists()] == []


def test_setup_states_what_the_package_is(monkeypatch: pytest.MonkeyPatch) -> None:
    stated: dict[str, Any] = {}
    stand_in = SimpleNamespace(setup=lambda **arguments: stated.update(arguments), find_packages=lambda **_: [])
    monkeypatch.setitem(sys.modules, "setuptools", stand_in)  # type: ignore[arg-type]
    monkeypatch.chdir("/")  # pip may build from anywhere
    runpy.run_path(str(ROOT / "setup.py"))
    assert (stated["name"], stated["version"]) == ("dinoengine", dinoengine.__version__)
    assert stated["python_requires"] == ">=3.10"
    assert stated["license"] == "Apache-2.0"
    assert stated["long_description"].startswith("# dinoengine")


def test_every_dependency_is_for_something() -> None:
    """Imported by the package."""
    imported = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "dinoengine").rglob("*.py"))
    module_of = {"pillow": "PIL", "scikit-learn": "sklearn", "pyyaml": "yaml"}
    for line in ast.literal_eval(_setup_arguments()["install_requires"]):
        name = re.split(r"[ ;<>=]", line)[0]
        module = module_of.get(name.lower(), name)
        assert re.search(rf"^\s*(?:from|import) {module}\b", imported, re.MULTILINE), name


def test_the_tests_import_only_what_the_test_extra_installs() -> None:
    extras = ast.literal_eval(_setup_arguments()["extras_require"])["test"]
    installed = ast.literal_eval(_setup_arguments()["install_requires"]) + extras
    names = {re.split(r"[ ;<>=\[]", line)[0].lower() for line in installed}
    package_of = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
    imported = set()
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    own = {"dinoengine", "tests", "tools", "__future__", "setuptools"}
    assert {package_of.get(n, n).lower() for n in imported - sys.stdlib_module_names - own} <= names


def test_markers_used_by_tests_are_declared_with_a_meaning() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = set(re.findall(r'^\s+"(\w+): ', text, re.MULTILINE))
    used = set()
    for path in (ROOT / "tests").rglob("*.py"):
        used |= set(re.findall(r"pytest\.mark\.(\w+)", path.read_text(encoding="utf-8")))
    assert used - {"parametrize", "skipif", "xfail", "filterwarnings", "usefixtures", "skip", "mark"} <= declared


def _documented_commands() -> list[str]:
    """Calls of the training tools in documents and config headers, as written; a header's go on in indented lines."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").rglob("*.yaml"))]
    pattern = re.compile(
        r"^(?:# Command\s+)?python (tools/(?:plain_)?train_net\.py (?:.*\\\n)*.*(?:\n# {11}\S.*)*)$", re.MULTILINE
    )
    found = [command for file in files for command in pattern.findall(file.read_text(encoding="utf-8"))]
    return [re.sub(r"\\?\n(?:# +)?", " ", command) for command in found]


@pytest.mark.parametrize("command", _documented_commands())
def test_documented_commands_are_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags, config files, keys and values as the reader would paste them."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)  # recipes are for machines with eight
    monkeypatch.setattr(
        config_loading, "fit_config_to_weights", lambda cfg, **run: None
    )  # the reader's file, not there
    args = default_argument_parser().parse_args(shlex.split(command)[1:])
    if args.config_file.startswith("output/"):  # that of a run
        cfg = get_cfg()
        cfg.merge_from_list(args.opts)
        validate(cfg, training=False)
        return
    if not args.config_file.startswith("configs/"):
        weights = args.config_file.replace(".yaml", ".pth")  # what another command there makes, with a config beside it
        assert f" {weights}" in (ROOT / "README.md").read_text(encoding="utf-8")
        return
    cfg = load_config(args)
    if "OUTPUT_DIR" in args.opts:
        assert args.opts[args.opts.index("OUTPUT_DIR") + 1] == cfg.OUTPUT_DIR


def test_documents_show_commands_at_all() -> None:
    assert len(_documented_commands()) >= 5
