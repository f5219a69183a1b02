"""More of the shape: what the table says, config keys followed through aliases, registries that build."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinoengine.config import CfgNode, get_cfg
from dinoengine.config.renamed import RENAMED, REPLACED
from dinoengine.data import (
    AUGMENTATION_REGISTRY,
    DATASET_REGISTRY,
    ImageDataset,
    build_dataset,
    build_test_loader,
    build_train_loader,
)
from dinoengine.evaluation import EVALUATOR_REGISTRY, inference_on_dataset
from dinoengine.modeling import BACKBONE_REGISTRY, HEAD_REGISTRY, META_ARCH_REGISTRY, Backbone
from dinoengine.solver import OPTIMIZER_REGISTRY, param_groups
from dinoengine.structures import BackboneOutput, ClassifierOutput, ImageBatch
from tests.data.datasets.test_fashion_mnist import write_idx_files
from tests.masks import write_mask_folder
from tests.test_architecture import PACKAGE, ROOT, SOURCES, _keys, import_rows
from tests.voc import draw_labels, write_voc_split

Chain = tuple[str, ...]

HEAVY = {"torchvision", "xformers", "tensorboardX", "matplotlib", "sklearn", "PIL", "scipy"}
KEYS = {tuple(key.split(".")) for key in _keys(get_cfg())}
GROUPS = {key[:i] for key in KEYS for i in range(1, len(key))}
# Read by CfgNode itself when it merges a file.
READ_ELSEWHERE = {("VERSION",)}


# ---------------------------------------------------------------------------------------------------- imports


def test_the_documented_rows_are_the_agreed_ones() -> None:
    """test_architecture trusts the table in the document; this holds the table."""
    assert import_rows() == {
        "tools": 7,
        "tests": 7,
        "benchmarks": 7,
        "engine": 6,
        "evaluation": 5,
        "checkpoint": 4,
        "data": 3,
        "modeling": 3,
        "solver": 3,
        "structures": 2,
        "config": 1,
        "utils": 0,
    }


def test_no_module_takes_a_package_off_the_root() -> None:
    """``from dinoengine import engine`` would pass by the rows, which look at the second name of the path."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "dinoengine"
    ]
    assert found == []


def _module_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: everything outside functions."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            yield from _module_level(node)


def test_heavy_packages_are_imported_inside_functions_only() -> None:
    found = []
    for path in SOURCES:
        for node in _module_level(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            heavy = [n for n in names if n.split(".")[0] in HEAVY or n.startswith("fvcore.nn")]
            found += [f"{path.relative_to(ROOT)}:{node.lineno} {name}" for name in heavy]  # type: ignore[attr-defined]
    assert found == []


def test_tools_and_benchmarks_do_not_lean_on_tests_or_each_other() -> None:
    found = []
    for folder in ("tools", "benchmarks"):
        for path in sorted((ROOT / folder).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                found += [f"{path.name}: {n}" for n in names if n.split(".")[0] in ("tests", "tools", "benchmarks")]
    assert found == []


@pytest.mark.parametrize("package", sorted(p.parent.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("__init__.py")))
def test_all_lists_exactly_what_the_package_imports(package: str) -> None:
    """A name imported and not listed, or listed and not imported, is a public interface that nobody decided on."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    } - {"annotations"}
    listed = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert set(listed[0] if listed else ()) == imported
    assert len(set(listed[0] if listed else ())) == len(listed[0] if listed else ())


# ------------------------------------------------------------------------------------------------ config keys


def _chain(node: ast.expr) -> Chain:
    """``a.b.C`` -> ("a", "b", "C"); empty for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return (node.id, *parts) if isinstance(node, ast.Name) else ()


def _after_cfg(chain: Chain) -> Chain:
    """The part of a chain below its ``cfg``: ("self", "cfg", "SEED") -> ("SEED",)."""
    return chain[chain.index("cfg") + 1 :] if "cfg" in chain else ()


def _aliases(tree: ast.AST) -> dict[str, Chain]:
    """Names bound to a group of the config: ``loss = cfg.MODEL.LOSS``, also in tuple assignments."""
    found: dict[str, Chain] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        target, value = node.targets[0], node.value
        both_tuples = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
        pairs = zip(target.elts, value.elts, strict=True) if both_tuples else [(target, value)]  # type: ignore[union-attr]
        for name, expression in pairs:
            path = _after_cfg(_chain(expression))
            if isinstance(name, ast.Name) and path in GROUPS:
                found[name.id] = path
    return found


def _reads(source: str) -> set[Chain]:
    """Upper-case paths read from a config in a module, with aliases resolved.

    A path that starts inside a group (a head's ``from_config`` gets its group as ``cfg``) stays as written.
    """
    tree = ast.parse(source)
    aliases = _aliases(tree)
    found = set()
    for node in ast.walk(tree):
        chain = _chain(node) if isinstance(node, ast.Attribute) else ()
        if "cfg" in chain:
            path = _after_cfg(chain)
        elif chain and chain[0] in aliases:
            path = (*aliases[chain[0]], *chain[1:])
        elif chain and not chain[0].isupper():
            path = tuple(part for part in chain[1:] if part.isupper())  # a parameter that holds a group
            path = path if any(key[-len(path) :] == path for key in KEYS if path) else ()
        else:
            path = ()
        upper = []
        for part in path:
            if not (part.isupper() and part[0].isalpha()):
                break
            upper.append(part)
        if upper:
            found.add(tuple(upper))
    return found


def _readers() -> list[Path]:
    """Where reading a key means using it: not where it is defined or merely checked."""
    config = [PACKAGE / "config" / "defaults.py", PACKAGE / "config" / "validate.py"]
    return [p for p in SOURCES if p not in config] + sorted((ROOT / "tools").glob("*.py"))


def test_reads_are_followed_through_aliases() -> None:
    source = """
def f(cfg, head_cfg):
    loss = cfg.MODEL.LOSS
    a, b = cfg.SEED, cfg.MODEL.VIT
    return loss.DINO_WEIGHT, b.SIZE.lower(), head_cfg.HIDDEN_DIM, cfg.NO.SUCH, torch.float32, mp.TIMEOUT
"""
    assert _reads(source) - {("MODEL",), ("NO",)} == {  # what a path goes through is read, too
        ("MODEL", "LOSS"),
        ("MODEL", "LOSS", "DINO_WEIGHT"),
        ("SEED",),
        ("MODEL", "VIT"),
        ("MODEL", "VIT", "SIZE"),
        ("HIDDEN_DIM",),
        ("NO", "SUCH"),
    }


def test_every_key_is_used_and_not_only_checked() -> None:
    read = {path for file in _readers() for path in _reads(file.read_text(encoding="utf-8"))}
    partial = {path for path in read if path[:1] not in GROUPS and path not in KEYS}
    unused = [key for key in KEYS - READ_ELSEWHERE - read if not any(key[-len(path) :] == path for path in partial)]
    assert sorted(unused) == []


def test_every_path_that_is_read_is_a_key_or_a_group() -> None:
    files = [*_readers(), PACKAGE / "config" / "validate.py", *sorted((ROOT / "benchmarks").glob("*.py"))]
    tails = {key[i:] for key in KEYS | GROUPS for i in range(len(key))}
    wrong = []
    for file in files:
        for path in _reads(file.read_text(encoding="utf-8")):
            known = path in KEYS | GROUPS if path[:1] in GROUPS else path in tails
            wrong += [] if known else [f"{file.relative_to(ROOT)}: {'.'.join(path)}"]
    assert wrong == []


KEY_IN_TEXT = re.compile(
    rf"\b((?:{'|'.join(sorted({k[0] for k in KEYS if len(k) > 1}))})(?:\.[A-Z][A-Z0-9_]*)+)\b(?![A-Z0-9_]*\*)"
)
TEXTS = [
    *SOURCES,
    *sorted((ROOT / "tools").glob("*.py")),
    *sorted((ROOT / "benchmarks").glob("*.*")),
    *sorted((ROOT / "configs").rglob("*.yaml")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
]


@pytest.mark.parametrize("path", TEXTS, ids=[str(p.relative_to(ROOT)) for p in TEXTS])
def test_every_key_named_in_a_message_or_document_exists(path: Path) -> None:
    """An error that tells the user to set a key that is not there helps nobody."""
    named = {tuple(name.split(".")) for name in KEY_IN_TEXT.findall(path.read_text(encoding="utf-8"))}
    invented = {("MODEL", "WIDTH")} if path.name == "configurable.py" else set()  # the example of its docstring
    if path.name == "renamed.py":
        invented = {tuple(name.split(".")) for name in (*RENAMED, *REPLACED)}
    assert sorted(".".join(key) for key in named - KEYS - GROUPS - invented) == []


# ------------------------------------------------------------------------------------------------- registries


CLASSIFIER = ["INPUT.AUGMENTATION", "SingleCrop", "MODEL.CLASSIFIER.NUM_CLASSES", 3]
NEEDED_BY: dict[str, list[Any]] = {
    "ImageClassifier": [*CLASSIFIER, "MODEL.CLASSIFIER.FREEZE_BACKBONE", False],
    "classification": CLASSIFIER,
}


@pytest.mark.parametrize("name", META_ARCH_REGISTRY.names())
def test_meta_architectures_keep_their_contract(name: str, tiny_cfg: CfgNode) -> None:
    tiny_cfg.MODEL.META_ARCHITECTURE = name
    tiny_cfg.merge_from_list(NEEDED_BY.get(name, []))
    model = META_ARCH_REGISTRY.get(name)(tiny_cfg)
    assert model.training
    if hasattr(model, "teacher_temp"):
        model.teacher_temp = 0.05
    batch = next(iter(build_train_loader(tiny_cfg)))
    losses = model(batch)
    total = losses.total()
    assert total.shape == ()
    assert torch.isfinite(total)
    contributions = [value for _, value in losses.contributions()]
    torch.testing.assert_close(total, torch.stack(contributions).sum())

    total.backward()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in trainable.items() if p.grad is None] == []  # DDP refuses a parameter without gradient
    clipped = [id(p) for group in model.clip_groups().values() for p in group]
    assert sorted(clipped) == sorted(id(p) for p in trainable.values())
    for parameter_name in trainable:
        assert model.param_facts(parameter_name).role in ("", "patch_embed", "last_layer")

    images = batch.images if isinstance(batch, ImageBatch) else batch.global_crops
    output = model.feature_model()(images)
    assert isinstance(output, BackboneOutput)
    assert output.cls_token.shape[0] == len(images)


@pytest.mark.parametrize("name", BACKBONE_REGISTRY.names())
def test_backbones_keep_their_contract(name: str, tiny_cfg: CfgNode) -> None:
    tiny_cfg.MODEL.VIT.NUM_REGISTER_TOKENS = 3
    backbone = BACKBONE_REGISTRY.get(name)(tiny_cfg)
    assert isinstance(backbone, Backbone)
    teacher = BACKBONE_REGISTRY.get(name)(tiny_cfg, drop_path_rate=0.0)
    assert teacher.state_dict().keys() == backbone.state_dict().keys()
    rows, columns = 3, 2
    output = backbone(torch.randn(2, 3, rows * backbone.patch_size, columns * backbone.patch_size))
    assert output.grid == (rows, columns)
    assert output.cls_token.shape == (2, backbone.embed_dim)
    assert output.register_tokens.shape == (2, 3, backbone.embed_dim)
    assert output.patch_tokens.shape == (2, rows * columns, backbone.embed_dim)
    layers = {backbone.param_facts(n).layer_id for n, _ in backbone.named_parameters()}
    assert layers <= set(range(backbone.num_layers + 2))


@pytest.mark.parametrize("name", HEAD_REGISTRY.names())
@pytest.mark.parametrize("group", ["DINO_HEAD", "IBOT_HEAD"])
def test_heads_map_any_leading_shape_to_prototypes(name: str, group: str, tiny_cfg: CfgNode) -> None:
    tiny_cfg.MODEL[group].NUM_PROTOTYPES = 7
    head = HEAD_REGISTRY.get(name)(tiny_cfg.MODEL[group], in_dim=5)
    assert head(torch.randn(2, 3, 5)).shape == (2, 3, 7)
    assert head(torch.randn(0, 5)).shape == (0, 7)
    roles = {head.param_facts(n).role for n, _ in head.named_parameters()}
    assert "last_layer" in roles  # or SOLVER.FREEZE_LAST_LAYER_ITERS would freeze nothing


def _dataset_string(name: str, folder: Path) -> str:
    if name == "folder":
        from PIL import Image

        Image.new("RGB", (9, 7), (10, 20, 30)).save(folder / "one.png")
        return f"folder:{folder}"
    if name == "masks":
        return write_mask_folder(folder, 2)
    if name == "voc2007":
        return write_voc_split(folder, "test", draw_labels(2, seed=0))
    if name == "fashion-mnist":
        write_idx_files(folder, "train", np.zeros((2, 28, 28), np.uint8), np.zeros(2, np.uint8))
        return f"fashion-mnist:root={folder}"
    return name


# Their files are many; the tests in tests/data/datasets make them and build from them.
_WITH_FILES_OF_THEIR_OWN = {"ImageNet", "ImageNet22k", "hf", "list", "torchvision", "wds"}


@pytest.mark.parametrize("name", sorted(set(DATASET_REGISTRY.names()) - _WITH_FILES_OF_THEIR_OWN))
def test_datasets_build_from_their_name_and_give_images(name: str, tmp_path: Path) -> None:
    dataset = build_dataset(_dataset_string(name, tmp_path))
    assert isinstance(dataset, ImageDataset)
    assert len(dataset) > 0
    image, label = dataset[len(dataset) - 1]
    assert min(image.size) > 0
    assert label is None or isinstance(label, int)
    if dataset.class_names is not None:
        assert dataset.labels().tolist() == [dataset.label(i) for i in range(len(dataset))]


@pytest.mark.parametrize("name", AUGMENTATION_REGISTRY.names())
def test_augmentations_draw_from_the_given_generator_alone(name: str, tiny_cfg: CfgNode) -> None:
    from PIL import Image

    augmentation = AUGMENTATION_REGISTRY.get(name)(tiny_cfg)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 17, 3), dtype=np.uint8)
    runs = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)  # noqa: NPY002 - the generator that must not be used
        global_crops, local_crops = augmentation(Image.fromarray(pixels), np.random.default_rng(5))
        num_global, num_local = (1, 0) if name == "SingleCrop" else (2, tiny_cfg.INPUT.LOCAL_CROPS.NUM)
        assert [tuple(c.shape) for c in global_crops] == [(3, 8, 8)] * num_global
        assert [tuple(c.shape) for c in local_crops] == [(3, 4, 4)] * num_local
        assert {c.dtype for c in [*global_crops, *local_crops]} == {torch.uint8}
        runs.append([*global_crops, *local_crops])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", OPTIMIZER_REGISTRY.names())
def test_optimizers_move_against_the_gradient_and_keep_every_parameter(name: str, tiny_cfg: CfgNode) -> None:
    model = META_ARCH_REGISTRY.get("DINOv2")(tiny_cfg)
    optimizer = OPTIMIZER_REGISTRY.get(name)(tiny_cfg, param_groups(model, layer_decay=0.9, patch_embed_lr_mult=0.2))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, held)) == sorted(map(id, trainable))
    before = [p.detach().clone() for p in held]
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    for p in held:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all((p < old).all() for p, old in zip(held, before, strict=True))


class _Pixels(torch.nn.Module):
    """The pixels as features, and as logits of three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> ClassifierOutput:
        tokens = (images.float() / 255 * self.scale).flatten(1).unsqueeze(1)
        return ClassifierOutput(tokens[:, 0], tokens[:, :0], tokens, (1, 1), logits=tokens[:, 0, :3])


@pytest.mark.parametrize("name", EVALUATOR_REGISTRY.names())
def test_evaluators_report_numbers_by_task_and_metric(name: str, tiny_cfg: CfgNode, tmp_path: Path) -> None:
    (dataset,) = tiny_cfg.DATASETS.TEST
    if name in ("segmentation", "dense_knn"):
        dataset = write_mask_folder(tmp_path, 2)
        tiny_cfg.merge_from_list(
            ["DATASETS.TRAIN", dataset, "TEST.SEGMENTATION.ITERS", 2, "TEST.SEGMENTATION.WARMUP_ITERS", 0]
        )
        tiny_cfg.merge_from_list(["TEST.SEGMENTATION.IMS_PER_BATCH", 2])
    tiny_cfg.merge_from_list(NEEDED_BY.get(name, []))
    evaluator = EVALUATOR_REGISTRY.get(name)(tiny_cfg, dataset, build_test_loader)
    results: dict[str, Any] = inference_on_dataset(_Pixels(), build_test_loader(tiny_cfg, dataset), evaluator)
    assert list(results) == [name]
    assert results[name]
    assert all(isinstance(value, float) and 0 <= value <= 100 for value in results[name].values())
