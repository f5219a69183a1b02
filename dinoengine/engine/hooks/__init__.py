from dinoengine.engine.hooks.bad_images import BadImageLog
from dinoengine.engine.hooks.bad_steps import BadStepRecorder
from dinoengine.engine.hooks.callback import CallbackHook
from dinoengine.engine.hooks.checkpointing import BestCheckpointer, EarlyStopping, PeriodicCheckpointer
from dinoengine.engine.hooks.collapse import CollapseError, CollapseGuard
from dinoengine.engine.hooks.ema import EMATeacher
from dinoengine.engine.hooks.evaluation import EvalHook, EvaluationInterrupted, KNNEvalHook, PreciseBN
from dinoengine.engine.hooks.guard import NonFiniteGuard
from dinoengine.engine.hooks.profiling import StartupReport, TorchProfiler
from dinoengine.engine.hooks.schedules import LRScheduler, ParamSchedule
from dinoengine.engine.hooks.stopping import StopOnSignal, TimeBudget, parse_duration
from dinoengine.engine.hooks.timing import IterationTimer
from dinoengine.engine.hooks.writing import PeriodicWriter

__all__ = [
    "BadImageLog",
    "BadStepRecorder",
    "BestCheckpointer",
    "CallbackHook",
    "CollapseError",
    "CollapseGuard",
    "EMATeacher",
    "EarlyStopping",
    "EvalHook",
    "EvaluationInterrupted",
    "IterationTimer",
    "KNNEvalHook",
    "LRScheduler",
    "NonFiniteGuard",
    "ParamSchedule",
    "PeriodicCheckpointer",
    "PeriodicWriter",
    "PreciseBN",
    "StartupReport",
    "StopOnSignal",
    "TimeBudget",
    "TorchProfiler",
    "parse_duration",
]
