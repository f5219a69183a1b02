#!/usr/bin/env python
"""Find the images of datasets now, so that trainings start at once, and say where the index is kept.

    python tools/build_index.py folder:/data/photos
    python tools/build_index.py ImageNet:split=TRAIN:root=/data/imagenet:extra=/data/extra
    python tools/build_index.py --dump-extra ImageNet:split=TRAIN:root=/data/imagenet:extra=/data/extra

An index that is still true is read, not made. With --dump-extra the files that the published code reads (entries-*.npy,
class-ids-*.npy, class-names-*.npy) are written into extra as well. docs/data.md tells where an index lies and when it is
made anew.
"""

from __future__ import annotations

import argparse

from dinoengine.data.build_index import build_index
from dinoengine.engine import exit_on_user_error
from dinoengine.utils.console import run_tool
from dinoengine.utils.logger import setup_logger


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+", metavar="DATASET", help="a dataset string, see docs/data.md")
    parser.add_argument("--dump-extra", action="store_true", help="of ImageNet: also the files of the published code")
    args = parser.parse_args()
    setup_logger()
    with exit_on_user_error():
        for text in args.datasets:
            print(build_index(text, dump_extra=args.dump_extra))


if __name__ == "__main__":
    run_tool(main)
