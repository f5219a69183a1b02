"""What a collapse of self-supervised training looks like in the metrics of a run, and what helps.

Thresholds are far from what healthy runs show: digits with the quickstart recipe have features with a relative spread of
0.8 to 0.95, targets with 0.87 of the largest entropy at most, and a loss 1 % from log K when its warm-up ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dinoengine.utils.events import EventStorage

CONSTANT = "constant features"
UNIFORM = "uniform targets"
SINGLE = "a single prototype for all images"
STUCK = "loss stuck at log K"
CONSTANT_IN_TEST = "constant features in the test set"
DIMENSIONAL = "dimensional collapse"

STEP_KINDS = (CONSTANT, UNIFORM, SINGLE, STUCK)
TEST_KINDS = (CONSTANT_IN_TEST, DIMENSIONAL)

# Relative to features spread over the whole sphere; 0.05 is a mean cosine of 0.9975 between images.
_CONSTANT_BELOW = 0.05
# Entropy of the targets over log K.
_UNIFORM_ABOVE = 0.995
# Perplexity of the mean target: 1 when all images get the same prototype.
_SINGLE_BELOW = 1.5
# Distance of the cross entropy from log K, relative to log K.
_STUCK_WITHIN = 0.002
# RankMe over its largest possible value, and over the highest that the run has had.
_LOW_RANK = 0.1
_FALLEN_RANK = 0.5
# Spread and use of prototypes say nothing about a batch of fewer images.
FEWEST_IMAGES = 8

_CONSTANT_ADVICE = (
    "look at the crops (tools/show_config.py --inputs), set MODEL.LOSS.KOLEO_WEIGHT 0.1 or more, lower SOLVER.BASE_LR, "
    "raise SOLVER.WARMUP_ITERS; in a new run set MODEL.LOSS.CENTERING sinkhorn_knopp"
)
ADVICE = {
    CONSTANT: _CONSTANT_ADVICE,
    UNIFORM: (
        "lower MODEL.TEACHER.TEMP and MODEL.TEACHER.WARMUP_TEMP, for a short run MODEL.TEACHER.MOMENTUM; in a new "
        "run lower MODEL.DINO_HEAD.NUM_PROTOTYPES"
    ),
    SINGLE: (
        "lower MODEL.LOSS.CENTER_MOMENTUM, raise MODEL.TEACHER.TEMP, raise SOLVER.FREEZE_LAST_LAYER_ITERS; in a new "
        "run set MODEL.LOSS.CENTERING sinkhorn_knopp"
    ),
    STUCK: (
        "lower MODEL.TEACHER.TEMP, raise SOLVER.BASE_LR or SOLVER.IMS_PER_BATCH, set SOLVER.LAYER_DECAY 1.0; in "
        "a new run lower MODEL.DINO_HEAD.NUM_PROTOTYPES"
    ),
    CONSTANT_IN_TEST: _CONSTANT_ADVICE,
    DIMENSIONAL: (
        "raise MODEL.LOSS.KOLEO_WEIGHT, lower SOLVER.BASE_LR, lower SOLVER.WEIGHT_DECAY_END, raise MODEL.TEACHER.MOMENTUM"
    ),
}


@dataclass(frozen=True)
class Scales:
    """What the metrics of a run are measured against.

    Attributes:
        num_prototypes: K of the DINO head.
        dino_weight: of the DINO loss; 0: there is none.
        images_per_process: images that one process computes a metric from.
        window: iterations of one reading.
    """

    num_prototypes: int
    dino_weight: float
    images_per_process: int
    window: int

    @property
    def has_enough_images(self) -> bool:
        """Whether spread and use of prototypes say something: of a few images they are small in a healthy run too."""
        return self.images_per_process >= FEWEST_IMAGES


def step_symptoms(storage: EventStorage, scales: Scales) -> dict[str, str]:
    """Kind -> what was measured, by medians over the last window; metrics that a model does not report are not judged."""
    names = storage.latest().keys()
    median = {name: storage.smoothed(name, scales.window) for name in names if storage.role(name) in ("loss", "metric")}
    found: dict[str, str] = {}
    spread = median.get("feature_std_relative", math.inf)
    if scales.has_enough_images and spread < _CONSTANT_BELOW:
        found[CONSTANT] = f"feature_std_relative {spread:.2g}, of at most 1"
    if scales.num_prototypes < 3 or not scales.dino_weight:
        return found
    largest = math.log(scales.num_prototypes)
    entropy = median.get("teacher_entropy", 0.0)
    if entropy > _UNIFORM_ABOVE * largest:
        found[UNIFORM] = f"teacher_entropy {entropy:.4f}, log K is {largest:.4f}"
    perplexity = median.get("prototype_perplexity", math.inf)
    if scales.has_enough_images and perplexity < _SINGLE_BELOW:
        found[SINGLE] = f"prototype_perplexity {perplexity:.3g}, of at most {scales.num_prototypes}"
    losses = [median[name] / scales.dino_weight for name in median if name.startswith("loss_dino_")]
    if losses and abs(sum(losses) / largest - 1) < _STUCK_WITHIN:
        found[STUCK] = f"cross entropy {sum(losses):.4f}, log K is {largest:.4f}"
    return found


def evaluation_symptoms(storage: EventStorage) -> dict[str, str]:
    """Kind -> what was measured, in the last results of the evaluator "label_free" on any dataset."""
    found: dict[str, str] = {}
    for name in storage.names("eval"):
        values = [value for value, _ in storage.history(name).values()]
        if name.endswith("label_free/feature_std_relative") and values[-1] < _CONSTANT_BELOW:
            found[CONSTANT_IN_TEST] = f"{name} {values[-1]:.2g}, of at most 1"
        if name.endswith("label_free/rankme_share"):
            highest = max(values)
            if values[-1] < _LOW_RANK and values[-1] < _FALLEN_RANK * highest:
                found[DIMENSIONAL] = f"{name} {values[-1]:.3f}, it was {highest:.3f}"
    return found


def last_evaluation(storage: EventStorage) -> int:
    """Iteration of the last results of the evaluator "label_free"; -1 without."""
    latest = storage.latest()
    return max((latest[name][1] for name in storage.names("eval") if "label_free/" in name), default=-1)
