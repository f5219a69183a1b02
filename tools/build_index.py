#!/usr/bin/env python
"""Find the images of datasets now, so that trainings start at once, and say where the index is kept.

    python tools/build_index.py folder:/data/photos
    python tools/build_index.py ImageNet:split=TRAIN:root=/data/imagenet:extra=/data/extra
    python tools/build_index.py --dump-extra ImageNet:split=TRAIN:root=/data/imagenet:extra=/data/extra
    python tools/build_index.py --list
    python tools/build_index.py --prune

An index that is still true is read, not made. With --dump-extra the files that the published code reads (entries-*.npy,
class-ids-*.npy, class-names-*.npy) are written into extra as well. --list shows the indexes of the cache, --prune removes
those whose folder or shards are gone. docs/data.md tells where an index lies and when it is made anew.
"""

from __future__ import annotations

import argparse

from dinoengine.data.build_index import build_index
from dinoengine.data.file_index import cache_folder
from dinoengine.data.index_cache import describe_indexes, kept_indexes, prune
from dinoengine.engine import exit_on_user_error
from dinoengine.utils.console import run_tool
from dinoengine.utils.logger import setup_logger


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="*", metavar="DATASET", help="a dataset string, see docs/data.md")
    parser.add_argument("--dump-extra", action="store_true", help="of ImageNet: also the files of the published code")
    parser.add_argument("--list", action="store_true", help="show the indexes of the cache, then end")
    parser.add_argument("--prune", action="store_true", help="remove those whose folder or shards are gone, then end")
    args = parser.parse_args()
    if bool(args.datasets) + args.list + args.prune != 1:
        parser.error("give datasets, or --list, or --prune")
    setup_logger()
    with exit_on_user_error():
        if args.list:
            print(describe_indexes(kept_indexes(), cache_folder()))
        if args.prune:
            print(f"Removed: {describe_indexes(prune(), cache_folder())}")
        for text in args.datasets:
            print(build_index(text, dump_extra=args.dump_extra))


if __name__ == "__main__":
    run_tool(main)
