"""Every layout by name, and which one a file is of."""

from __future__ import annotations

import logging

from dinoengine.checkpoint.files import CheckpointError, FileContent, grouped_names, short_list
from dinoengine.checkpoint.layouts.cerebras import Cerebras
from dinoengine.checkpoint.layouts.dino import Dino, IBot
from dinoengine.checkpoint.layouts.hugging_face import HuggingFace
from dinoengine.checkpoint.layouts.layout import Hints, Layout
from dinoengine.checkpoint.layouts.meta import MetaBackbone, MetaTeacher
from dinoengine.checkpoint.layouts.own import Own
from dinoengine.checkpoint.layouts.timm import Timm
from dinoengine.checkpoint.reading import read_content
from dinoengine.checkpoint.weights import Weights

logger = logging.getLogger(__name__)

# In the order in which they are tried: those with marks of their own first.
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (Own(), Cerebras(), HuggingFace(), MetaTeacher(), MetaBackbone(), IBot(), Timm(), Dino())
}


def detect_layout(content: FileContent) -> Layout:
    """The layout of a file, by its keys.

    Raises:
        CheckpointError: if it is none of those known.
    """
    names = list(content.data)
    if set(names) == {"weight", "bias"}:
        raise CheckpointError(
            f"{content.path} is a linear head alone, without a backbone; give it to tools/convert_to_classifier.py "
            "--linear-head, with the backbone it is for."
        )
    if any("_flat_param" in name for value in content.data.values() if isinstance(value, dict) for name in value):
        raise CheckpointError(
            f"{content.path} is one rank's shard of an FSDP training (model_*.rank_*.pth), of use to that training alone. "
            "Take the teacher_checkpoint.pth that the training writes into eval/."
        )
    for layout in LAYOUTS.values():
        if layout.detect(content):
            if layout.name == "dino" and "cls_token" in names:
                logger.warning(
                    "%s is taken for a backbone of DINO; a timm ViT without LayerScale has the same keys, and interpolates "
                    "positions otherwise. If it is one, give its layout (--from timm of the tools).",
                    content.path,
                )
            return layout
    raise CheckpointError(
        f"{content.path} is of no layout known here; it has {short_list(grouped_names(names)) or 'nothing'}. Known: "
        + "; ".join(f"{layout.name}: {layout.description}" for layout in LAYOUTS.values())
        + "."
    )


def read_weights(path: str, layout: str = "auto", hints: Hints | None = None) -> Weights:
    """Read a file of any layout.

    Args:
        layout: a name in LAYOUTS, or "auto" to go by the keys.
        hints: what the file does not say.

    Raises:
        FileNotFoundError, CheckpointError: if it cannot be read.
    """
    content = read_content(path)
    chosen = detect_layout(content) if layout == "auto" else LAYOUTS[layout]
    return chosen.read(content, hints or Hints())
