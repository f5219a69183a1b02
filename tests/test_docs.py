"""Every example of docs/extending.md runs as shown."""

import re
from pathlib import Path

import pytest

from dinoengine.data import AUGMENTATION_REGISTRY, DATASET_REGISTRY
from dinoengine.evaluation import EVALUATOR_REGISTRY
from dinoengine.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from dinoengine.solver import OPTIMIZER_REGISTRY

ROOT = Path(__file__).resolve().parent.parent
REGISTRIES = [
    AUGMENTATION_REGISTRY,
    BACKBONE_REGISTRY,
    DATASET_REGISTRY,
    EVALUATOR_REGISTRY,
    META_ARCH_REGISTRY,
    OPTIMIZER_REGISTRY,
]


@pytest.fixture
def clean_registries():
    """Take back what an example registers."""
    before = [dict(registry._obj_map) for registry in REGISTRIES]
    yield
    for registry, content in zip(REGISTRIES, before, strict=True):
        registry._obj_map.clear()
        registry._obj_map.update(content)


def test_all_examples_train_together(clean_registries, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    assert len(blocks) == 7
    script, *parts = blocks
    namespace: dict = {"__name__": "example"}
    for block in [*parts, script.replace("run_command(SSLTrainer)", "run_command(MyTrainer)")]:
        exec(compile(block, "docs/extending.md", "exec"), namespace)
    overrides = {
        "OUTPUT_DIR": tmp_path,
        "DATASETS.TRAIN": "stripes:num_images=8",
        "DATASETS.TEST": "synthetic:num_images=6:num_classes=2:size=16",
        "TEST.EVALUATORS": "('feature_std',)",
        "MODEL.BACKBONE.NAME": "PatchMean",
        "MODEL.META_ARCHITECTURE": "DINOv2WithSmallHeads",
        "MODEL.VIT.PATCH_SIZE_PX": 4,
        "MODEL.DINO_HEAD.NUM_PROTOTYPES": 8,
        "MODEL.DINO_HEAD.HIDDEN_DIM": 8,
        "MODEL.DINO_HEAD.BOTTLENECK_DIM": 4,
        "INPUT.AUGMENTATION": "QuarterTurns",
        "INPUT.GLOBAL_CROPS.SIZE_PX": 16,
        "INPUT.LOCAL_CROPS.SIZE_PX": 8,
        "INPUT.LOCAL_CROPS.NUM": 1,
        "INPUT.TEST.RESIZE_PX": 16,
        "INPUT.TEST.CROP_SIZE_PX": 16,
        "SOLVER.OPTIMIZER": "NAdam",
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.MAX_ITER": 3,
        "SOLVER.WARMUP_ITERS": 1,
        "SOLVER.FREEZE_LAST_LAYER_ITERS": 0,
        "DATALOADER.NUM_WORKERS": 0,
        "LOG.TENSORBOARD": False,
    }
    words = ["--num-gpus", "0", *(f"{key}={value}" for key, value in overrides.items())]
    results = namespace["run_command"](namespace["MyTrainer"], words)
    assert results["feature_std"]["mean"] > 0
    metrics = (tmp_path / "metrics.json").read_text()
    assert '"loss_prototype_scale"' in metrics
    assert '"prototype_scale"' in metrics
