"""The backbone beside those of timm and transformers, where they are installed: random weights, no download.

``pip install -e '.[interop]'`` installs both. The weights travel as files of their layouts, as conversions write them.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import tempfile
from collections.abc import Iterator

import torch

from dinoengine.checkpoint.convert import write_content
from dinoengine.checkpoint.layouts import LAYOUTS, Hints
from dinoengine.checkpoint.parity import compare_files
from dinoengine.checkpoint.weights import BackboneSpec, Weights
from dinoengine.evaluation.numerics.quantity import Quantity, largest

TOLERANCE = 1e-4
# Kind of the feed-forward layer -> its hidden width at 48 channels, and how the table calls it
FFN_HIDDEN = {"mlp": 192, "swiglu": 128}
FFN_NAMES = {"mlp": "MLP", "swiglu": "SwiGLU"}


def check_timm() -> Iterator[Quantity]:
    """timm's VisionTransformer; it resamples the position table with antialiasing."""
    yield from _check("timm", "timm", antialias={0: True, 4: True})


def check_transformers() -> Iterator[Quantity]:
    """Dinov2Model and Dinov2WithRegistersModel of Hugging Face; antialiasing only with registers."""
    yield from _check("huggingface", "transformers", antialias={0: False, 4: True})


def _check(layout: str, library: str, antialias: dict[int, bool]) -> Iterator[Quantity]:
    for registers, ffn in itertools.product(antialias, FFN_HIDDEN):
        label = f"tokens, {library} with {registers} registers, {FFN_NAMES[ffn]}, largest difference"
        if importlib.util.find_spec(library) is None:
            yield Quantity(label, library, 0.0, None, TOLERANCE, f"{library} is not installed", skipped=True)
            continue
        weights = _random_weights(registers, ffn, antialias[registers])
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "weights")
            write_content(LAYOUTS[layout].write(weights)[0], path)
            comparisons = compare_files(weights, path, layout, Hints(num_heads=weights.spec.num_heads))
        source = f"{library} {importlib.import_module(library).__version__}"
        yield Quantity(label, source, 0.0, largest(c.difference for c in comparisons), TOLERANCE)


@torch.no_grad()
def _random_weights(registers: int, ffn: str, antialias: bool) -> Weights:
    """No entry keeps a value (0, 1, 1e-5) behind which a wrong place could hide."""
    spec = BackboneSpec(
        embed_dim=48,
        depth=2,
        num_heads=4,
        patch_size=14,
        in_chans=3,
        table_grid=(5, 5),
        num_register_tokens=registers,
        ffn=ffn,
        ffn_hidden=FFN_HIDDEN[ffn],
        layer_scale=True,
        qkv_bias=True,
        proj_bias=True,
        ffn_bias=True,
        interpolate_antialias=antialias,
        interpolate_offset=0.0,
    )
    generator = torch.Generator().manual_seed(0)
    entries = {
        name: torch.randn(value.shape, generator=generator) * 0.2 + ("norm" in name and name.endswith("weight"))
        for name, value in spec.build("meta").state_dict().items()
    }
    return Weights("dinoengine", spec, {"backbone": entries})
