"""torch.compile of repeated modules."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable

from torch import nn

from dinoengine.utils.logger import log_first_n

_COMPILERS = ("g++", "clang++", "c++")


def compile_modules(modules: Iterable[nn.Module]) -> None:
    """Compile each module in place; modules of the same code share one compilation, names of parameters stay.

    Raises:
        ValueError: if the machine has no C++ compiler, which torch.compile needs also for CUDA.
    """
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else list(_COMPILERS)
    if not any(shutil.which(name) for name in candidates):
        raise ValueError(
            f"MODEL.COMPILE needs a C++ compiler, and none of {', '.join(candidates)} was found. Install one (on Debian or "
            "Ubuntu: apt install g++), set CXX to its path, or set MODEL.COMPILE False."
        )
    # Once, though student and teacher are compiled both.
    log_first_n(
        logging.INFO,
        "MODEL.COMPILE: the first iteration compiles the blocks, which may take minutes without a sign.",
        name=__name__,
    )
    for module in modules:
        module.compile()
