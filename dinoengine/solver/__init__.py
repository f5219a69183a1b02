from dinoengine.solver.build import (
    OPTIMIZER_REGISTRY,
    OptimizerSchedule,
    build_lr_scheduler,
    build_optimizer,
    build_teacher_schedules,
    scale_config_to_world_size,
    scaled_lr,
)
from dinoengine.solver.clipping import clip_grad_norms_
from dinoengine.solver.param_groups import param_groups
from dinoengine.solver.schedules import CosineSchedule, FrozenStart, LinearWarmupSchedule, Schedule

__all__ = [
    "OPTIMIZER_REGISTRY",
    "CosineSchedule",
    "FrozenStart",
    "LinearWarmupSchedule",
    "OptimizerSchedule",
    "Schedule",
    "build_lr_scheduler",
    "build_optimizer",
    "build_teacher_schedules",
    "clip_grad_norms_",
    "param_groups",
    "scale_config_to_world_size",
    "scaled_lr",
]
