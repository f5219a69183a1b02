from dinoengine.checkpoint.layouts.known import LAYOUTS, detect_layout, read_weights
from dinoengine.checkpoint.layouts.layout import Hints, Layout

__all__ = ["LAYOUTS", "Hints", "Layout", "detect_layout", "read_weights"]
