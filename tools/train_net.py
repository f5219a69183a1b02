#!/usr/bin/env python
"""Train or evaluate from a config; ``--help`` shows examples. See ``dinoengine/engine/command.py`` for what it does."""

from dinoengine.engine import run_command

if __name__ == "__main__":
    run_command()
