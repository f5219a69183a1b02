"""Packaging of dinoengine."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "dinoengine" / "__init__.py").read_text(encoding="utf-8"))
assert VERSION is not None, "dinoengine/__init__.py has no __version__"

setup(
    name="dinoengine",
    version=VERSION.group(1),
    description="A detectron2-style engine for self-supervised pretraining of vision transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["dinoengine", "dinoengine.*"]),
    install_requires=[
        # get_total_norm and clip_grads_with_norm_ are in torch since 2.6
        "torch>=2.6",
        "torchvision",
        "fvcore",
        "iopath",
        "yacs>=0.1.8",
        # CUDA kernels; wheels for Linux only, and nothing imports it on a machine without a GPU
        "xformers; sys_platform == 'linux' and platform_machine == 'x86_64'",
        "tensorboardX>=2.6",
        "termcolor",
        "tabulate",
        "tqdm",
        "scikit-learn",
        # groups of images that look alike; scikit-learn needs it anyway
        "scipy",
        "Pillow",
        "numpy",
        "PyYAML",
        # URLs of other protocols than http; torch needs it, too
        "fsspec",
        # weight files of Hugging Face
        "safetensors",
    ],
    extras_require={
        # INPUT.AUGMENTATION_BACKEND fast
        "fast": ["opencv-python-headless"],
        "plot": ["matplotlib"],
        # TIFF files with many channels, colours of 16 bits or several pages
        "tiff": ["tifffile", "imagecodecs"],
        # tools/extract_features.py --parquet
        "parquet": ["pyarrow"],
        # datasets named hf:...
        "hf": ["datasets"],
        # files named s3://...
        "s3": ["s3fs"],
        # Other libraries' models, to compare with
        "interop": ["timm", "transformers"],
        # tools/export_model.py --to onnx
        "onnx": ["onnx", "onnxruntime", "onnxscript"],
        "test": [
            "pytest>=8",
            "pytest-xdist",
            "timm",
            "transformers",
            "hypothesis",
            "opencv-python-headless",
            "tifffile",
            # a server of s3:// on this machine
            "s3fs",
            "moto[s3]",
            "flask",
            "flask-cors",
            "ruff==0.17.5",
            "mypy==2.4.1",
            "types-PyYAML",
            "types-tabulate",
            "types-tqdm",
            "matplotlib",
            "onnx",
            "onnxruntime",
            "onnxscript",
        ],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
