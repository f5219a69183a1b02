"""Checkpoint and image files, damaged in nine ways: what reading them comes to. A part of ``reliability.py``."""

from __future__ import annotations

import faulthandler
import io
import os
import random
from collections import Counter

import numpy as np
from torch import nn

from dinoengine.checkpoint import Checkpointer, CheckpointError, read_checkpoint
from dinoengine.checkpoint.digest import content_digest
from dinoengine.checkpoint.resuming import checkpoint_name
from dinoengine.data import UnreadableImageError
from dinoengine.data.decode import read_image

# Whoever takes longer hangs; the benchmark then ends with a traceback.
SECONDS_TO_READ = 60


def mutate(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """(what was done, the damaged bytes); never the same bytes."""
    kind = rng.choice(("bit", "byte", "truncated", "empty", "zeros", "swapped", "shifted", "appended", "head"))
    at, size = rng.randrange(len(data)), min(512, len(data) // 4)
    damaged = bytearray(data)
    if kind == "bit":
        damaged[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        damaged[at] = (damaged[at] + rng.randrange(1, 256)) % 256
    elif kind == "truncated":
        del damaged[at:]
    elif kind == "empty":
        damaged.clear()
    elif kind == "zeros":
        damaged[at : at + size] = bytes(len(damaged[at : at + size]))
    elif kind == "swapped":
        a, b = rng.randrange(len(data) // 2 - size), rng.randrange(len(data) // 2, len(data) - size)
        damaged[a : a + size], damaged[b : b + size] = damaged[b : b + size], damaged[a : a + size]
    elif kind == "shifted":
        del damaged[at : at + rng.randrange(1, 9)]
    elif kind == "appended":
        damaged += rng.randbytes(size)
    else:
        damaged[:16] = rng.randbytes(16)
    return (kind, bytes(damaged)) if bytes(damaged) != data else mutate(data, rng)


def damaged_checkpoints(folder: str, count: int, rng: random.Random) -> dict[str, int]:
    """A damaged last checkpoint: refused with its name and the one before it resumed from, or read as what was written
    (the damage was in what means nothing); anything else is wrong."""
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    checkpointer = Checkpointer(model, folder)
    digests = {}
    for iteration in (6, 7):
        nn.init.constant_(model[0].bias, iteration)  # type: ignore[arg-type]
        path = checkpointer.save(checkpoint_name(iteration), iteration=iteration)
        digests[iteration] = content_digest(model.state_dict())
    with open(path, "rb") as file:
        data = file.read()
    content = content_digest(read_checkpoint(path))
    found: Counter[str] = Counter(files=0, refused=0, same_content=0, wrong=0)
    for number in range(count):
        kind, damaged = mutate(data, rng)
        with open(path, "wb") as file:
            file.write(damaged)
        checkpointer.tag_last_checkpoint(os.path.basename(path))
        faulthandler.dump_traceback_later(SECONDS_TO_READ, exit=True)  # nothing can take that for an error of the file
        outcome, problem = "wrong", "was read as something else, or refused without its name"
        try:
            outcome = "same_content" if content_digest(read_checkpoint(path)) == content else "wrong"
        except CheckpointError as error:
            outcome = "refused" if path in str(error) else "wrong"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        last = {"refused": 6, "same_content": 7}.get(outcome)
        if last is not None:
            try:
                start = checkpointer.resume_or_load("")
                if (start, content_digest(model.state_dict())) != (last + 1, digests[last]):
                    outcome, problem = "wrong", f"was {outcome}, and resumed as iteration {start}"
            except Exception as error:
                outcome, problem = "wrong", f"was {outcome}; resuming: {type(error).__name__}: {error}"
        _note(found, outcome, f"checkpoint {number} ({kind}) {problem}", folder, damaged)
    faulthandler.cancel_dump_traceback_later()
    return dict(found)


def damaged_images(folder: str, count: int, rng: random.Random) -> dict[str, int]:
    """Damaged image files: refused with the file's name, or decoded (a flipped bit may be a pixel)."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    originals = {}
    for extension in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, extension)
        originals[extension] = buffer.getvalue()
    found: Counter[str] = Counter(files=0, refused=0, decoded=0, wrong=0)
    for number in range(count):
        extension = rng.choice(sorted(originals))
        kind, damaged = mutate(originals[extension], rng)
        path = os.path.join(folder, f"damaged.{extension.lower()}")
        with open(path, "wb") as file:
            file.write(damaged)
        faulthandler.dump_traceback_later(SECONDS_TO_READ, exit=True)
        outcome, problem = "wrong", "was refused without its name"
        try:
            read_image(path)
            outcome = "decoded"
        except UnreadableImageError as error:
            outcome = "refused" if path in str(error) else "wrong"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        _note(found, outcome, f"image {number} ({extension}, {kind}) {problem}", folder, damaged)
    faulthandler.cancel_dump_traceback_later()
    return dict(found)


def _note(found: Counter[str], outcome: str, problem: str, folder: str, damaged: bytes) -> None:
    found["files"] += 1
    found[outcome] += 1
    if outcome == "wrong":
        path = os.path.join(folder, f"wrong_{found['wrong']}")
        with open(path, "wb") as file:
            file.write(damaged)
        print(f"  {problem}; it is kept as {path}", flush=True)
