"""Every config key under TEST, once: what is evaluated, when, and how.

None of them changes what is trained, unless it says so.
"""

from __future__ import annotations

from dinoengine.config.config import CfgNode as CN

_C = CN()

_C.TEST = CN()
# Names in EVALUATOR_REGISTRY; each evaluates every dataset of DATASETS.TEST: "knn", and for a classifier "classification"
# (top-1 and top-5 of its own head).
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
# Few-shot: numbers of training images per class, e.g. (1, 5, 10), evaluated beside the whole training set with the k up to
# that number and the number itself; results are called top1_k5_n10. Empty: off.
_C.TEST.KNN.NUM_PER_CLASS = ()
# Random choices of these images (the number of the try is the seed); reported are the mean and, for several, the standard
# deviation (top1_k5_n10_std).
_C.TEST.KNN.NUM_TRIES = 1
# MiB of similarities held at a time, over training and test images both; the search needs about as much again, plus a copy
# of the features. Does not change results.
_C.TEST.KNN.MEMORY_MIB = 256
# Type in which similarities are computed: "float32", "float16" or "bfloat16". Half the memory and faster on a GPU; on a CPU
# mostly slower. Rounding makes ties, which the order of the training set decides: changes results slightly.
_C.TEST.KNN.SIMILARITY_DTYPE = "float32"

# Recompute BatchNorm statistics before each evaluation (only for models that have BatchNorm).
_C.TEST.PRECISE_BN = CN()
_C.TEST.PRECISE_BN.ENABLED = False
# Number of training batches used for it.
_C.TEST.PRECISE_BN.NUM_ITER = 200


def get_cfg() -> CN:
    """A fresh copy of these defaults."""
    return _C.clone()
