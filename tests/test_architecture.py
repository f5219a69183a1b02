"""The shape of the code, held by reading its syntax trees."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dinoengine.config import CfgNode, get_cfg, validate

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dinoengine"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
BANNED_NAMES = {"utils", "helpers", "misc", "common"}

# Modules whose behaviour is tested under another name.
TESTED_ELSEWHERE = {
    "config/evaluation_defaults.py": "config/test_defaults.py",
    "config/solver_defaults.py": "config/test_defaults.py",
    "config/validate_evaluation.py": "config/test_validate.py",
    **{
        f"engine/hooks/{name}.py": "engine/hooks/test_small_hooks.py"
        for name in ("timing", "schedules", "ema", "writing", "profiling", "callback")
    },
    **{
        f"modeling/layers/{name}.py": "modeling/layers/test_small_layers.py"
        for name in ("attention", "block", "layer_scale", "mlp", "patch_embed", "pixel_norm")
    },
    **{
        f"checkpoint/{name}.py": "checkpoint/test_convert.py"
        for name in (*(f"layouts/{n}" for n in ("known", "layout", "timm")),)
    },
    "checkpoint/consolidate.py": "engine/test_sharding_processes.py",
    "checkpoint/fitting.py": "checkpoint/test_checkpointer.py",
    "checkpoint/start_weights.py": "checkpoint/test_adopt.py",
    "engine/hooks/collapse_symptoms.py": "engine/hooks/test_collapse.py",
    "engine/reporting.py": "engine/test_ssl_trainer.py",
    "modeling/meta_arch/feature_model.py": "modeling/meta_arch/test_student_teacher.py",
    "modeling/heads/build.py": "modeling/test_build.py",
    "modeling/backbone/build.py": "modeling/test_build.py",
    "modeling/backbone/backbone.py": "modeling/backbone/test_vit.py",
}


def _module(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def _ids(paths: list[Path]) -> list[str]:
    return [_module(p) for p in paths]


def import_rows() -> dict[str, int]:
    """Package -> row, read from the table in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = {}
    for number, names in re.findall(r"^(\d) ((?:\w+ ?(?:\| )?)+)", text, re.MULTILINE):
        for name in re.split(r"[ |]+", names.split("  ")[0].strip()):
            rows[name] = int(number)
    return rows


def test_the_documented_table_names_every_package() -> None:
    packages = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"} | {"structures"}
    assert packages <= import_rows().keys()


@pytest.mark.parametrize("path", SOURCES, ids=_ids(SOURCES))
def test_imports_go_down_only(path: Path) -> None:
    rows = import_rows()
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [node.module or ""]
        for name in names:
            parts = name.split(".")
            if parts[0] in ("tests", "tools", "benchmarks"):
                pytest.fail(f"{path}:{node.lineno} imports {name}")
            if parts[0] == "dinoengine" and len(parts) > 1 and parts[1] != own:
                assert rows[parts[1]] < rows[own], f"{path}:{node.lineno}: {own} may not import {parts[1]}"


@pytest.mark.parametrize("path", SOURCES, ids=_ids(SOURCES))
def test_files_and_functions_stay_short_and_well_named(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert path.stem not in BANNED_NAMES
    assert not any(part in {"helpers", "misc", "common"} for part in path.parts[:-1])
    assert len(source.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{node.name} is too long"


@pytest.mark.parametrize("path", SOURCES, ids=_ids(SOURCES))
def test_every_module_has_a_test_of_its_own(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    if path.name == "__init__.py":
        return
    mirrored = TESTED_ELSEWHERE.get(_module(path), str(relative.parent / f"test_{relative.name}"))
    assert (ROOT / "tests" / mirrored).exists(), f"tests/{mirrored} is missing"


@pytest.mark.parametrize("path", SOURCES, ids=_ids(SOURCES))
def test_public_classes_and_modules_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.name != "__init__.py":
        assert ast.get_docstring(tree), "the module says nothing about its purpose"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not _is_plain_data(node):
            assert ast.get_docstring(node), f"class {node.name} has no docstring"


def _is_plain_data(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id in ("NamedTuple", "Protocol") for base in node.bases)


def _keys(node: CfgNode, prefix: str = "") -> list[str]:
    keys = []
    for name, value in node.items():
        keys += _keys(value, f"{prefix}{name}.") if isinstance(value, CfgNode) else [f"{prefix}{name}"]
    return keys


def _attribute_chains() -> set[tuple[str, ...]]:
    """Every ``a.b.C.D`` written in package, tools and benchmarks, as tuples of names."""
    chains = set()
    files = [
        p
        for p in SOURCES
        if p.name not in ("defaults.py", "solver_defaults.py", "evaluation_defaults.py") or "engine" in p.parts
    ]
    for path in [*files, *sorted((ROOT / "tools").glob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts: list[str] = []
            while isinstance(node, ast.Attribute):
                parts.insert(0, node.attr)
                node = node.value
            if parts and isinstance(node, ast.Name):
                chains.add((node.id, *parts))
    return chains


def test_every_config_key_is_read_somewhere() -> None:
    # Through any alias: `loss = cfg.MODEL.LOSS; loss.DINO_WEIGHT` ends with the key's last name.
    read = {part for chain in _attribute_chains() for part in chain[1:]}
    unread = [key for key in _keys(get_cfg()) if key != "VERSION" and key.split(".")[-1] not in read]
    assert unread == []


def test_every_key_that_is_read_exists() -> None:
    cfg = get_cfg()
    known = {tuple(key.split(".")) for key in _keys(cfg)}
    groups = {key[:i] for key in known for i in range(1, len(key))}
    wrong = []
    for name, *parts in _attribute_chains():
        if name != "cfg" or not parts or not parts[0].isupper():
            continue
        path = tuple(part for part in parts if part.isupper())
        # A from_config may get a group as its cfg (heads do), so the end of a key is enough.
        if path not in groups and not any(key[-len(path) :] == path for key in known):
            wrong.append(".".join(path))
    assert wrong == []


CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=[str(p.relative_to(ROOT)) for p in CONFIGS])
def test_shipped_configs_are_valid_and_say_where_they_come_from(path: Path) -> None:
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    assert validate(cfg, world_size=1, training=path.parent.name != "evaluation") == []
    header = path.read_text(encoding="utf-8").splitlines()[0]
    assert header.startswith("# ")
    assert "Command " in path.read_text(encoding="utf-8")


# Time stamps in files. Durations come from time.perf_counter and time.monotonic, which never jump.
_SAYS_THE_DATE = {
    "dinoengine/engine/run_lock.py",
    "dinoengine/evaluation/feature_store.py",
    "dinoengine/evaluation/records.py",
}


def test_no_duration_comes_from_a_clock_that_can_jump() -> None:
    for path in sorted([*(ROOT / "dinoengine").rglob("*.py"), *(ROOT / "tools").glob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            chain = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            from_time = isinstance(node, ast.ImportFrom) and node.module == "time"
            assert not from_time, f"{path}: write time.monotonic, so that the clock can be seen where it is read"
            if chain in ("time.time", "time.time_ns") or chain.endswith(
                ("datetime.now", "datetime.utcnow", "date.today")
            ):
                assert str(path.relative_to(ROOT)) in _SAYS_THE_DATE, (
                    f"{path}:{node.lineno} reads the wall clock: {chain}"
                )


def test_documents_name_only_files_that_exist() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = document.read_text(encoding="utf-8")
        for name in re.findall(r"\b((?:tools|configs|docs|benchmarks|tests)/[\w/.-]+\.(?:py|yaml|md))\b", text):
            assert (ROOT / name).exists(), f"{document.name} names {name}"
        for target in re.findall(r"\]\(([\w/.-]+\.md)\)", text):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_nothing_names_a_path_of_one_machine() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    pattern = re.compile(r"(?<![\w.])/(?:root|home|Users)/\w")
    for name in tracked:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".sh", ""} and path.is_file():
            assert not pattern.search(path.read_text(encoding="utf-8")), name


@pytest.mark.slow
def test_importing_is_light() -> None:
    """Beside torch only small packages, and no device: one fresh process imports everything there is."""
    code = """
import sys

def packages():
    return {name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)

before = packages()
import dinoengine
assert packages() == before | {"dinoengine"}, "import dinoengine alone imports other packages"
import torch
of_torch = packages()
import dinoengine.engine, dinoengine.data, dinoengine.modeling, dinoengine.evaluation
small = {"dinoengine", "fvcore", "tabulate", "termcolor", "tqdm", "yacs", "yaml"}
ours = {name for name in packages() - of_torch if not name.startswith("_")}
assert ours <= small, f"heavy packages: {sorted(ours - small)}"
# The compiler takes as long as the rest of torch.
slow = [name for name in ("fvcore.nn", "torch._dynamo", "torch._inductor", "torch.onnx") if name in sys.modules]
assert not slow, slow
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
