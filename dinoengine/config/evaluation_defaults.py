"""Every config key under TEST, once: what is evaluated, when, and how.

None of them changes what is trained, unless it says so.
"""

from __future__ import annotations

from dinoengine.config.config import CfgNode as CN

_C = CN()

_C.TEST = CN()
# Names in EVALUATOR_REGISTRY; each evaluates every dataset of DATASETS.TEST that has the labels or masks it needs: "knn",
# "linear" (a grid of linear heads), "logreg" (logistic regression), "label_free" (rank, spectrum and spread of the
# features, use of the prototypes; needs no labels); for datasets with masks "segmentation" (linear probe) and "dense_knn";
# for a classifier "classification" (top-1 and top-5 of its own head).
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
# One labelled training set per dataset of DATASETS.TEST, in the same order, for evaluators without TRAIN of their own:
# many transfer tasks in one run. Empty: all take DATASETS.TRAIN.
_C.TEST.TRAIN_PER_TEST = ()

_C.TEST.KNN = CN()
# Labelled datasets that the neighbours come from; empty: DATASETS.TRAIN.
_C.TEST.KNN.TRAIN = ()
# Numbers of neighbours; those above the size of the training set are cut to it.
_C.TEST.KNN.K = (10, 20, 100, 200)
# What images are compared by: "cls", their CLS tokens (published); "mean_patch", the means of their patch tokens; "patch",
# all patch tokens side by side, which keeps where things are, for images that are aligned. Part of the protocol.
_C.TEST.KNN.FEATURE = "cls"
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
_C.TEST.KNN.MEMORY_MIB = 512
# Type in which similarities are computed: "float32", "float16" or "bfloat16". Half the memory and faster on a GPU; on a CPU
# mostly slower. Rounding makes ties, which the order of the training set decides: changes results slightly.
_C.TEST.KNN.SIMILARITY_DTYPE = "float32"

_C.TEST.LABEL_FREE = CN()
# First and last rank of the covariance's eigenvalues that the exponent alpha is fitted to; the largest has rank 1. Those
# that do not exist, or that rounding hides, are left out.
_C.TEST.LABEL_FREE.ALPHA_RANKS = (4, 50)

# The linear probe. Its defaults are the published grid of 52 heads with 1024 images per batch (8 GPUs with 128 each).
_C.TEST.LINEAR = CN()
# Labelled datasets that the heads are trained on; empty: TEST.TRAIN_PER_TEST or DATASETS.TRAIN.
_C.TEST.LINEAR.TRAIN = ()
# Labelled datasets that choose the best head; empty: the test set does, as for the published figures, and the protocol in
# the results says so.
_C.TEST.LINEAR.VAL = ()
# Length of the training: passes over the training set (EPOCHS), or iterations (ITERS); one of the two is 0. The published
# 12,500 iterations are 10 passes over ImageNet-1k.
_C.TEST.LINEAR.EPOCHS = 10.0
_C.TEST.LINEAR.ITERS = 0
# Global batch; divisible by the number of processes, of which results do not depend.
_C.TEST.LINEAR.IMS_PER_BATCH = 1024
# Learning rates per 256 images of the global batch; each becomes a head per input.
_C.TEST.LINEAR.BASE_LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
# Inputs of the heads: the CLS tokens of this many last blocks, each number with each choice in MEAN_PATCH: whether the mean
# patch token of the last block comes with them. Numbers that the backbone has no blocks for are left out, with a warning.
_C.TEST.LINEAR.NUM_LAST_BLOCKS = (1, 4)
_C.TEST.LINEAR.MEAN_PATCH = (False, True)
# Random resized crops of size INPUT.TEST.CROP_SIZE_PX: smallest and largest share of the image (shape: INPUT.CROP_RATIO),
# and the probability of a flip.
_C.TEST.LINEAR.CROP_SCALE = (0.08, 1.0)
_C.TEST.LINEAR.HFLIP_PROB = 0.5
# Seed of order, crops and the heads' initial weights, >= 0; not SEED, so that probes of two runs are comparable.
_C.TEST.LINEAR.SEED = 0
# Compute the features of the training set once, from evaluation crops without augmentation: minutes instead of hours, and
# another protocol. Memory per process: images x width x (blocks + 1) x 4 bytes.
_C.TEST.LINEAR.CACHED = False
# Iterations between looks at the validation set, for the log alone; 0: only at the end.
_C.TEST.LINEAR.VAL_PERIOD = 0
# Iterations between checkpoints of heads and optimizer (and one at the end), from which a killed probe goes on when the
# command is given again; deleted when the results are there. 0: none.
_C.TEST.LINEAR.CHECKPOINT_PERIOD = 1000

# Logistic regression (scikit-learn, L-BFGS) on CLS tokens that are not normalised.
_C.TEST.LOGREG = CN()
# Labelled datasets to fit to; empty: TEST.TRAIN_PER_TEST or DATASETS.TRAIN.
_C.TEST.LOGREG.TRAIN = ()
# Labelled datasets that choose C, and are then fitted to as well; empty: HELD_OUT of the training images.
_C.TEST.LOGREG.VAL = ()
# Share of the training images that chooses C, drawn with SEED (>= 0); the last fit is to all.
_C.TEST.LOGREG.HELD_OUT = 0.1
_C.TEST.LOGREG.SEED = 0
# Values of C, the inverse strength of the L2 penalty: NUM_C of them, 10 to the power of evenly spaced numbers.
_C.TEST.LOGREG.C_LOG10_RANGE = (-6.0, 5.0)
_C.TEST.LOGREG.NUM_C = 45
# When L-BFGS ends: iterations, and largest entry of the gradient. 1e-12 is published; with 1e-4 large C are up to 20 times
# faster.
_C.TEST.LOGREG.MAX_LBFGS_ITERS = 1000
_C.TEST.LOGREG.TOL = 1e-12
# "float64" or "float32", of features and solver.
_C.TEST.LOGREG.DTYPE = "float64"
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
# MiB of similarities held at a time, as TEST.KNN.MEMORY_MIB. Does not change results.
_C.TEST.DENSE_KNN.MEMORY_MIB = 512

# Recompute BatchNorm statistics before each evaluation (only for models that have BatchNorm).
_C.TEST.PRECISE_BN = CN()
_C.TEST.PRECISE_BN.ENABLED = False
# Number of training batches used for it.
_C.TEST.PRECISE_BN.NUM_ITER = 200


def get_cfg() -> CN:
    """A fresh copy of these defaults."""
    return _C.clone()
