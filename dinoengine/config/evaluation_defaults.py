"""Every config key under TEST, once: what is evaluated, when, and how.

None of them changes what is trained, unless it says so.
"""

from __future__ import annotations

from dinoengine.config.config import CfgNode as CN

_C = CN()

_C.TEST = CN()
# Names in EVALUATOR_REGISTRY; each evaluates every dataset of DATASETS.TEST: "knn", "label_free" (rank, spectrum and
# spread of the features, use of the prototypes; needs no labels), and for a classifier "classification" (top-1 and top-5
# of its own head).
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
# Metric whose best value keeps its weights in model_best.pth: any that an evaluator reports, e.g. "knn/top1_k20" (with
# several datasets their string in front, "digits:split=test/knn/top1_k20"); empty: off.
_C.TEST.BEST_METRIC = ""
# "max" (higher is better) or "min".
_C.TEST.BEST_METRIC_MODE = "max"
# Periodic evaluations without a better TEST.BEST_METRIC after which the run ends early, with a final checkpoint and its
# results; 0: never. Changes results only by ending the run.
_C.TEST.EARLY_STOPPING_PATIENCE = 0

_C.TEST.KNN = CN()
# Labelled datasets that the neighbours come from; empty: DATASETS.TRAIN.
_C.TEST.KNN.TRAIN = ()
# Numbers of neighbours; those above the size of the training set are cut to it.
_C.TEST.KNN.K = (10, 20, 100, 200)
# Softmax temperature of the neighbours' votes.
_C.TEST.KNN.TEMPERATURE = 0.07
# Query rows compared with the bank at a time; bounds memory, does not change results.
_C.TEST.KNN.CHUNK_SIZE = 1024

_C.TEST.LABEL_FREE = CN()
# First and last rank of the covariance's eigenvalues that the exponent alpha is fitted to; the largest has rank 1. Those
# that do not exist, or that rounding hides, are left out.
_C.TEST.LABEL_FREE.ALPHA_RANKS = (4, 50)

# Recompute BatchNorm statistics before each evaluation (only for models that have BatchNorm).
_C.TEST.PRECISE_BN = CN()
_C.TEST.PRECISE_BN.ENABLED = False
# Number of training batches used for it.
_C.TEST.PRECISE_BN.NUM_ITER = 200


def get_cfg() -> CN:
    """A fresh copy of these defaults."""
    return _C.clone()
