"""Data never becomes code, names from data never become paths elsewhere, and nothing speaks to other machines."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from dinoengine.checkpoint import Checkpointer, CheckpointError
from dinoengine.config import ConfigError, get_cfg
from dinoengine.config.import_dinov2 import import_dinov2_config
from dinoengine.evaluation.linear_training import ProbeCheckpoint
from dinoengine.evaluation.records import save_record
from dinoengine.utils.file_io import local_path
from dinoengine.utils.file_writing import atomic_write
from tests.conftest import TINY
from tests.test_architecture import ROOT, SOURCES

FILES = [*SOURCES, *sorted((ROOT / "tools").glob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py"))]

# (file, what is called) -> why it is safe there.
ALLOWED = {
    ("dinoengine/utils/comm.py", "pickle.loads"): "of what the same process has just pickled",
    ("dinoengine/utils/url_handlers.py", "urllib.request.urlopen"): "of http(s) URLs that the user has named as data",
    ("dinoengine/checkpoint/export.py", "torch.export.load"): "of the file that the same function has just written",
}

NEVER = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open"),
    *("dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load", "pandas.read_pickle"),
    *("torch.jit.load", "torch.export.load", "torch.hub.load", "torch.hub.load_state_dict_from_url"),
    *("yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all", "yaml.load", "yaml.load_all"),
    *("eval", "exec", "__import__", "os.system", "os.popen", "os.execvp", "shutil.unpack_archive"),
    *("urllib.request.urlopen", "urllib.request.urlretrieve", "requests.get", "tempfile.mktemp"),
}
NEVER_METHODS = {"extractall"}
# What must be said, because the default of some version is the unsafe one.
MUST_SAY = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}
MUST_NOT_SAY = {"shell": True, "trust_remote_code": True, "allow_pickle": True, "weights_only": False}


def _imported(tree: ast.AST) -> dict[str, str]:
    """Local name -> dotted name of what was imported under it."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _dotted(node: ast.expr, imported: dict[str, str]) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([imported.get(node.id, node.id), *parts])


def unsafe_calls(source: str) -> list[tuple[int, str]]:
    """(line, what) of every call that could run what lies in a file, or start a shell."""
    tree = ast.parse(source)
    imported = _imported(tree)
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = _dotted(node.func, imported)
        said = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else None for k in node.keywords if k.arg}
        if name in NEVER or (isinstance(node.func, ast.Attribute) and node.func.attr in NEVER_METHODS):
            found.append((node.lineno, name or ast.unparse(node.func)))
        if name in MUST_SAY and said.get(MUST_SAY[name][0]) is not MUST_SAY[name][1]:
            found.append((node.lineno, f"{name} without {'='.join(map(str, MUST_SAY[name]))}"))
        found += [
            (node.lineno, f"{key}={said[key]}")
            for key, value in MUST_NOT_SAY.items()
            if key in said and said[key] in (value, None)
        ]
    return found


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_nothing_in_a_file_is_run(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    found = unsafe_calls(path.read_text(encoding="utf-8"))
    assert [call for call in found if (name, call[1]) not in ALLOWED] == []


def test_the_exceptions_are_still_there() -> None:
    for name, what in ALLOWED:
        assert what in [call for _, call in unsafe_calls((ROOT / name).read_text(encoding="utf-8"))], name


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch.load(f)",
        "import torch; torch.load(f, weights_only=False)",
        "import torch; torch.load(f, weights_only=flag)",
        "from torch import load as read; read(f)",
        "import pickle; pickle.load(f)",
        "from pickle import loads; loads(b)",
        "import pickle as p; p.Unpickler(f).load()",
        "import numpy as np; np.load(f)",
        "import numpy as np; np.load(f, allow_pickle=True)",
        "from numpy.lib import format; format.read_array(f, allow_pickle=True)",
        "import yaml; yaml.load(f, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load; unsafe_load(f)",
        "eval(text)",
        "exec(text)",
        "import os; os.system(text)",
        "import subprocess; subprocess.run(text, shell=True)",
        "from transformers import AutoModel; AutoModel.from_pretrained(p, trust_remote_code=True)",
        "import tarfile; tarfile.open(p).extractall(q)",
        "import zipfile\nwith zipfile.ZipFile(p) as z:\n    z.extractall()",
    ],
)
def test_the_check_finds(line: str) -> None:
    assert unsafe_calls(line) != []


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch.load(f, weights_only=True)",
        "import numpy as np; np.load(f, allow_pickle=False)",
        "import yaml; yaml.safe_load(f)",
        "import ast; ast.literal_eval(text)",
        "model.eval()",
        "import json; json.loads(text)",
        "trainer.load(path)",
    ],
)
def test_the_check_passes(line: str) -> None:
    assert unsafe_calls(line) == []


# ---- configs

PAYLOADS = (
    "OUTPUT_DIR: !!python/object/apply:os.mkdir [{mark}]",
    "!!python/object/new:os.mkdir [{mark}]",
    "DATASETS: {{TRAIN: !!python/object/apply:subprocess.check_call [[touch, {mark}]]}}",
    "SEED: !!python/name:os.system",
)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_config_that_asks_for_python_objects_is_refused(tmp_path: Path, payload: str) -> None:
    mark, path = tmp_path / "was_run", tmp_path / "config.yaml"
    path.write_text(payload.format(mark=mark))
    with pytest.raises(ConfigError, match=r"config\.yaml(?s:.)*not valid YAML(?s:.)*python/"):
        get_cfg().merge_from_file(str(path))
    with pytest.raises((ConfigError, ValueError), match="python/"):
        import_dinov2_config(str(path), num_gpus=1)
    assert not mark.exists()


def test_a_python_file_is_no_config(tmp_path: Path) -> None:
    """yacs would run it."""
    mark, path = tmp_path / "was_run", tmp_path / "config.py"
    path.write_text(f"import os\nos.mkdir({str(mark)!r})\ncfg = {{'SEED': 1}}\n")
    with pytest.raises(ConfigError):
        get_cfg().merge_from_file(str(path))
    assert not mark.exists()


@pytest.mark.parametrize("word", ["__import__('os').mkdir({mark!r})", "(1).__class__", "[x for x in (1,)]"])
def test_an_override_is_a_literal_or_a_text(tmp_path: Path, word: str) -> None:
    mark, cfg = str(tmp_path / "was_run"), get_cfg()
    cfg.merge_from_list(["OUTPUT_DIR", word.format(mark=mark)])
    assert word.format(mark=mark) == cfg.OUTPUT_DIR
    with pytest.raises(ConfigError):
        cfg.merge_from_list(["SEED", word.format(mark=mark)])
    assert not os.path.exists(mark)


# ---- names from data

ESCAPES = (
    "../../escaped",
    "/escaped",
    "folder:../../../escaped/x",
    "a/../../escaped",
    "..",
    "folder:/a/b\0c",
    "x" * 500,
)


@pytest.mark.parametrize("dataset", ESCAPES)
def test_a_record_lies_in_the_folder_of_records_whatever_the_dataset_is_called(tmp_path: Path, dataset: str) -> None:
    weights = {"iteration": None, "sha256": "0" * 64}
    record = {"dataset": dataset, "protocol": {}, "preprocessing": {}, "weights": weights}
    path = Path(save_record(record, str(tmp_path / "run")))
    assert path.resolve().parent == (tmp_path / "run" / "eval").resolve()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    assert json.loads(path.read_text())["dataset"] == dataset


@pytest.mark.parametrize("name", ESCAPES)
def test_a_probe_lies_there_too_whatever_its_data_is_called(tmp_path: Path, name: str) -> None:
    path = Path(ProbeCheckpoint(str(tmp_path), {"train": name}).path)
    assert path.resolve().parent == (tmp_path / "eval").resolve()


@pytest.mark.parametrize("content", ["../outside.pth", "{folder}/outside.pth", "..", ".", "a/../../outside.pth"])
def test_the_pointer_names_no_file_of_another_folder(tmp_path: Path, content: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "outside.pth").write_bytes(b"another run")
    (run / "last_checkpoint").write_text(content.format(folder=tmp_path))
    with pytest.raises(CheckpointError, match="which is not there"):
        Checkpointer(nn.Linear(1, 1), str(run)).get_checkpoint_file()


@pytest.mark.parametrize("url", ["https://host/../../../tmp/x.pth", "http://host/a/../../x/y.pth", "https://host/a/.."])
def test_a_download_cannot_leave_its_cache(url: str) -> None:
    with pytest.raises(ValueError, match=r"has '\.\.' in it"):
        local_path(url)


def test_a_temporary_file_is_nobodys_link(tmp_path: Path) -> None:
    """Its name cannot be guessed, and a link in place of the target is replaced, not followed."""
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "target").symlink_to(tmp_path / "elsewhere")
    with atomic_write(str(tmp_path / "target"), "w") as file:
        file.write("new")
    assert (tmp_path / "elsewhere").read_text() == "kept"
    assert (tmp_path / "target").read_text() == "new"
    assert not (tmp_path / "target").is_symlink()


# ---- the network

WATCHED = """
import sys
asked = []

def watch(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        host = str(args[0])
    elif event in ("socket.connect", "socket.sendto"):
        address = args[1]
        host = str(address[0]) if isinstance(address, tuple) else "localhost"  # a string is a Unix socket
    else:
        return
    if host not in ("localhost", "127.0.0.1", "::1"):
        asked.append((event, host))
        raise PermissionError(f"{event} {host}: no network here")

sys.addaudithook(watch)
"""


def _watched(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", WATCHED + code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_the_watch_sees_a_connection(tmp_path: Path) -> None:
    done = _watched("import urllib.request\nurllib.request.urlopen('http://192.0.2.1/', timeout=1)", tmp_path)
    assert done.returncode != 0
    assert "no network here" in done.stderr


@pytest.mark.slow
def test_importing_training_and_evaluating_speak_to_no_other_machine(tmp_path: Path) -> None:
    """Every module is imported, and a run trains with a worker, writes TensorBoard files, and evaluates."""
    settings = {**TINY, "SOLVER.MAX_ITER": 2, "DATALOADER.NUM_WORKERS": 1, "LOG.TENSORBOARD": True, "OUTPUT_DIR": "run"}
    words = ["--num-gpus", "0", *(str(word) for item in settings.items() for word in item)]
    code = f"""
import importlib, pkgutil
import dinoengine
for module in pkgutil.walk_packages(dinoengine.__path__, "dinoengine."):
    importlib.import_module(module.name)
from dinoengine.engine import run_command
run_command(argv={words!r})
assert asked == [], asked
assert not any(name.startswith(("huggingface_hub", "wandb", "sentry_sdk", "mlflow")) for name in sys.modules)
"""
    done = _watched(code, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "model_final.pth").exists()
