"""Every config key under TEST, once: what is evaluated, when, and how.

None of them changes what is trained, unless it says so.
"""

from __future__ import annotations

from dinoengine.config.config import CfgNode as CN

_C = CN()

_C.TEST = CN()
# Names in EVALUATOR_REGISTRY; each evaluates every dataset of DATASETS.TEST: "knn", and for a classifier "classification"
# (top-1 and top-5 of its own head). For datasets with masks: "segmentation" (linear probe), "dense_knn".
_C.TEST.EVALUATORS = ("knn",)
# Iterations between evaluations; 0: only at the end. Does not change results.
_C.TEST.EVAL_PERIOD = 0
# Evaluate also before the first iteration of a run, as iteration 0: what the weights of MODEL.WEIGHTS are worth
# before training touches them. Does not change results.
_C.TEST.EVAL_AT_START = False
# Images per evaluation batch over all processes.
_C.TEST.IMS_PER_BATCH = 256
# Rows (task, metric, expected, tolerance), e.g. ("knn", "top1_k20", 90.0, 2.0), checked after training and --eval-only;
# a miss ends with exit code 1. With several datasets in DATASETS.TEST the dataset string comes first in the row.
_C.TEST.EXPECTED_RESULTS = ()
# Features evaluated beside the teacher's, for orientation, after training and in --eval-only: any of "pixels"
# (the evaluation crop itself, mean-centred) and "untrained" (the backbone as SEED initialises it).
_C.TEST.BASELINES = ()
# Metric that BestCheckpointer watches, e.g. "knn/top1_k20" (higher is better); empty: off.
_C.TEST.BEST_METRIC = ""

_C.TEST.KNN = CN()
# Labelled datasets that the neighbours come from; empty: DATASETS.TRAIN.
_C.TEST.KNN.TRAIN = ()
# Numbers of neighbours; those above the size of the training set are cut to it.
_C.TEST.KNN.K = (10, 20, 100, 200)
# Softmax temperature of the neighbours' votes.
_C.TEST.KNN.TEMPERATURE = 0.07
# Query rows compared with the bank at a time; bounds memory, does not change results.
_C.TEST.KNN.CHUNK_SIZE = 1024

# Linear segmentation probe on frozen patch tokens: BatchNorm and one linear layer, trained with AdamW on random crops of
# INPUT.TEST.CROP_SIZE_PX.
_C.TEST.SEGMENTATION = CN()
# Datasets with masks that the head is trained on; empty: DATASETS.TRAIN.
_C.TEST.SEGMENTATION.TRAIN = ()
# The head sees the patch tokens of this many last blocks, each after the final norm: 1 or 4.
_C.TEST.SEGMENTATION.NUM_LAST_BLOCKS = 1
# Iterations; the published probe has 40,000 with 1,500 of warm-up, this one a tenth.
_C.TEST.SEGMENTATION.ITERS = 4000
# Images per iteration over all processes.
_C.TEST.SEGMENTATION.IMS_PER_BATCH = 16
# Peak learning rate; it rises linearly for WARMUP_ITERS, and falls linearly to 0 over all iterations.
_C.TEST.SEGMENTATION.BASE_LR = 1e-3
_C.TEST.SEGMENTATION.WARMUP_ITERS = 150
_C.TEST.SEGMENTATION.WEIGHT_DECAY = 1e-4
# Smallest and largest factor on the size of a training image whose shorter side is INPUT.TEST.RESIZE_PX.
_C.TEST.SEGMENTATION.RESIZE_RATIO = (0.5, 2.0)
# Probability of a horizontal flip of a training crop, 0..1.
_C.TEST.SEGMENTATION.HFLIP_PROB = 0.5
# Of the head's initial weights and the training crops, 0 or more; the same for all runs that are to be compared.
_C.TEST.SEGMENTATION.SEED = 0

# Segmentation by nearest neighbours among the patches of a training set.
_C.TEST.DENSE_KNN = CN()
# Datasets with masks that the bank of patches comes from; empty: DATASETS.TRAIN.
_C.TEST.DENSE_KNN.TRAIN = ()
# Number of neighbours; one above the size of the bank is cut to it.
_C.TEST.DENSE_KNN.K = 30
# Softmax temperature of the neighbours' votes.
_C.TEST.DENSE_KNN.TEMPERATURE = 0.07
# Largest number of patches in the bank, a random sample of those of the training set.
_C.TEST.DENSE_KNN.NUM_PATCHES = 100000
# Sample equally many patches of each class (fewer where there are not so many) instead of uniformly.
_C.TEST.DENSE_KNN.BALANCED = False
# Of the sample, 0 or more.
_C.TEST.DENSE_KNN.SEED = 0
# Patches compared with the bank at a time; memory is CHUNK_SIZE x NUM_PATCHES floats. Does not change results.
_C.TEST.DENSE_KNN.CHUNK_SIZE = 1024

# Recompute BatchNorm statistics before each evaluation (only for models that have BatchNorm).
_C.TEST.PRECISE_BN = CN()
_C.TEST.PRECISE_BN.ENABLED = False
# Number of training batches used for it.
_C.TEST.PRECISE_BN.NUM_ITER = 200


def get_cfg() -> CN:
    """A fresh copy of these defaults."""
    return _C.clone()
