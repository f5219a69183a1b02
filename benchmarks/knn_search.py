#!/usr/bin/env python
"""Seconds of the k-NN search beside those of faiss's exact inner-product index (pip install faiss-cpu), and whether both
find the same neighbours.

    OMP_NUM_THREADS=2 python benchmarks/knn_search.py        # 50,000 x 384 against 5,000 queries, k = 200

Rows are normalised beforehand, and the index is filled before the clock starts; the two take turns. The ratio is the median
over turns of ours / faiss: below 1 is faster.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

# Before torch and faiss: threads of one that wait must not spin beside the other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch.nn import functional as F

from dinoengine.evaluation.neighbours import DEFAULT_MEMORY_MIB, NeighbourSearch
from dinoengine.utils.env import collect_env_info


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=int, default=50_000, metavar="N", help="rows that are searched")
    parser.add_argument("--queries", type=int, default=5_000, metavar="N")
    parser.add_argument("--dim", type=int, default=384, metavar="N", help="width of a row")
    parser.add_argument("--k", type=int, default=200, help="neighbours of each query")
    parser.add_argument("--memory-mib", type=int, default=DEFAULT_MEMORY_MIB, metavar="N", help="TEST.KNN.MEMORY_MIB")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of both")
    parser.add_argument("--turns", type=int, default=7, metavar="N")
    parser.add_argument("--cpu-time", action="store_true", help="of all threads, where other work shares the cores")
    args = parser.parse_args()

    import faiss

    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    # Rows in 1000 overlapping clusters, as features are.
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(1000, args.dim, generator=generator)

    def rows(number: int) -> torch.Tensor:
        centre = centres[torch.randint(0, len(centres), (number,), generator=generator)]
        return F.normalize(centre + torch.randn(number, args.dim, generator=generator), dim=1)

    bank, queries = rows(args.bank), rows(args.queries)
    index = faiss.IndexFlatIP(args.dim)
    index.add(bank.numpy())
    search = NeighbourSearch(bank, args.k, memory_mib=args.memory_mib)

    clock = time.process_time if args.cpu_time else time.perf_counter
    seconds: dict[str, list[float]] = {"faiss": [], "dinoengine": []}
    for _ in range(args.turns):
        start = clock()
        similarity, neighbours = index.search(queries.numpy(), args.k)
        middle = clock()
        parts = list(search.search(queries))
        seconds["dinoengine"].append(clock() - middle)
        seconds["faiss"].append(middle - start)

    found = torch.cat([part.indices for part in parts]).sort(dim=1).values
    expected = torch.from_numpy(neighbours).sort(dim=1).values
    largest = (torch.cat([part.similarity for part in parts]) - torch.from_numpy(similarity)).abs().max()
    print(collect_env_info())
    print(f"bank {args.bank:,} x {args.dim}, {args.queries:,} queries, k = {args.k}, {args.threads} thread(s)")
    for name, values in seconds.items():
        print(f"{name:10}  median {statistics.median(values):.3f} s  ({min(values):.3f} to {max(values):.3f})")
    ratios = [ours / theirs for ours, theirs in zip(seconds["dinoengine"], seconds["faiss"], strict=True)]
    print(
        f"ratio of {args.turns} turns: median {statistics.median(ratios):.3f}  ({min(ratios):.3f} to {max(ratios):.3f})"
    )
    same = (found == expected).all(dim=1).float().mean()
    print(f"queries with the same set of neighbours: {100 * same:.2f} %; similarities differ by {largest:.1e} at most")


if __name__ == "__main__":
    main()
