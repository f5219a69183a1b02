from dinoengine.modeling.losses.dino import dino_loss
from dinoengine.modeling.losses.ibot import ibot_loss, mask_weights
from dinoengine.modeling.losses.koleo import koleo_loss
from dinoengine.modeling.losses.teacher_targets import Centering, SinkhornKnopp, build_targets

__all__ = ["Centering", "SinkhornKnopp", "build_targets", "dino_loss", "ibot_loss", "koleo_loss", "mask_weights"]
