#!/usr/bin/env python
"""Train or evaluate from a config; ``--help`` shows examples. See ``dinoengine/engine/command.py`` for what it does."""

import os

# Before torch: OpenMP threads that wait must sleep, not spin. With other work on the cores (a loader's worker is enough)
# spinning made CPU steps 3 to 20 times slower; figures in benchmarks/RESULTS.md.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from dinoengine.engine import run_command

if __name__ == "__main__":
    run_command()
