"""The writers of a run."""

from __future__ import annotations

import os

from dinoengine.utils.writers import METRICS_FILE, ConsoleWriter, EventWriter, JSONWriter, TensorboardXWriter


def default_writers(
    output_dir: str,
    max_iter: int,
    *,
    start_iter: int = 0,
    images_per_iter: int = 0,
    window_size: int = 20,
    tensorboard: bool = True,
    progress_bar: bool = True,
) -> list[EventWriter]:
    """Console, ``metrics.json`` and TensorBoard events in ``output_dir``."""
    os.makedirs(output_dir, exist_ok=True)
    rows = JSONWriter(os.path.join(output_dir, METRICS_FILE), start_iter)
    writers: list[EventWriter] = [
        ConsoleWriter(max_iter, images_per_iter=images_per_iter, window_size=window_size, progress_bar=progress_bar),
        rows,
    ]
    return [*writers, TensorboardXWriter(output_dir, start_iter, rows.last_known)] if tensorboard else writers
