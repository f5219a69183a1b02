#!/usr/bin/env python
"""Train or evaluate from a config; ``--help`` shows examples. See ``dinoengine/engine/command.py`` for what it does."""

import os

from dinoengine.utils.stop_signals import end_when_asked

if __name__ in ("__main__", "__mp_main__"):  # the command, and the processes that it spawns
    end_when_asked()  # before the imports, which take seconds

# Before torch: OpenMP threads that wait must sleep, not spin. With other work on the cores (a loader's worker is enough)
# spinning made CPU steps 3 to 20 times slower; figures in benchmarks/RESULTS.md.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from dinoengine.engine import run_command

if __name__ == "__main__":
    run_command()
