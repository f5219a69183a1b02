"""The k most similar rows, exactly, in bounded memory.

Similarities of a block of queries with a block of the bank are computed, and only those that can still be among the k
largest are looked at. A lower bound of the k-th largest finds them: the k-th largest of the maxima of small groups, later
the k-th largest of what has been found. Groups whose maximum is below it are never opened.

On the CPU blocks of queries are searched side by side, one thread each: what follows a matrix product consists of small
operations that torch does not spread over threads.

Shapes: Q queries, N rows of the bank, D features, q and n rows of a block of each.
"""

from __future__ import annotations

import contextlib
import math
import queue
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Blocks are filled up with zeros to a multiple of this. A matrix product of a few left-over rows or columns takes other
# kernels, which round differently: equal rows would have unequal similarities, and blocks would change results.
_ROWS_STEP = 64
_MAX_QUERY_ROWS = 1024
# Bank rows in one matrix product: large enough for its speed, small enough that the result is still in the cache.
_TILE_ROWS = 3072
_GROUP = 32
DEFAULT_MEMORY_MIB = 512
_LOWEST_KEY = torch.iinfo(torch.int64).min
_INDEX_MASK = (1 << 32) - 1


class Neighbours(NamedTuple):
    """Of some queries, most similar first; of equally similar ones that with the smaller index.

    Attributes:
        start: index of the first of these queries.
        similarity: [q, k] float32.
        indices: [q, k] int64, rows of the bank.
    """

    start: int
    similarity: Tensor
    indices: Tensor


class _Workspace(NamedTuple):
    """What the search of one block of queries writes to.

    Attributes:
        buffer: [q * n] the similarities of a block.
        candidates: those that can still be among the k largest.
    """

    buffer: Tensor
    candidates: _Candidates


class NeighbourSearch:
    """Finds the k rows of a bank with the largest cosine similarity.

    On the CPU the result does not depend on ``memory_mib`` or on which queries are asked for together. On other devices
    the kernels of a matrix product may depend on its size, so similarities may differ in their last bits.
    """

    def __init__(
        self, bank: Tensor, k: int, *, memory_mib: int = DEFAULT_MEMORY_MIB, dtype: torch.dtype = torch.float32
    ) -> None:
        """
        Args:
            bank: [N, D] of any length but zero, N < 2**32; a row of zeros is similar to nothing (0).
            k: 1..N.
            memory_mib: bounds the similarities held at a time; what is needed beside them is about as much again, plus a
                copy of the bank in ``dtype``.
            dtype: of the matrix product. Similarities of a half type have many ties, which the index decides.

        Raises:
            ValueError: if ``k`` is out of range.
        """
        if not 1 <= k <= len(bank):
            raise ValueError(f"k must be 1 to {len(bank)}, the number of rows of the bank; got {k}.")
        self.bank, self.num_rows, self.k = _unit_rows(bank, dtype), len(bank), k
        self.num_threads = torch.get_num_threads() if bank.device.type == "cpu" else 1
        num_bytes = memory_mib * 2**20 // self.num_threads
        # The candidates of a query are 2k keys of 8 bytes at most, and what a tile adds.
        self.query_rows = _steps(min(_MAX_QUERY_ROWS, num_bytes // (16 * k)))
        self.block_rows = min(len(self.bank), _steps(num_bytes // (self.bank.element_size() * self.query_rows)))
        self.tile_rows = min(_TILE_ROWS, _steps(self.block_rows // 8))
        # One for each thread; whoever searches takes one.
        self._workspaces: queue.SimpleQueue[_Workspace] = queue.SimpleQueue()
        for _ in range(self.num_threads):
            buffer = self.bank.new_empty(self.query_rows * self.block_rows)
            candidates = _Candidates(self.query_rows, k, self.tile_rows, bank.device)
            self._workspaces.put(_Workspace(buffer, candidates))

    def search(self, queries: Tensor) -> Iterator[Neighbours]:
        """[Q, D], on any device -> the neighbours of at most ``query_rows`` queries at a time, in their order."""
        num_blocks = math.ceil(len(queries) / self.query_rows)
        num_blocks = math.ceil(num_blocks / self.num_threads) * self.num_threads  # none waits while another works
        size = min(self.query_rows, _steps_up(math.ceil(len(queries) / max(1, num_blocks))))
        inference = torch.is_inference_mode_enabled()  # of this thread; what was made in it is written to in it only

        def neighbours(start: int) -> Neighbours:
            with torch.inference_mode(inference):
                rows = queries[start : start + size].to(self.bank.device)
                keys = self._best(_unit_rows(rows, self.bank.dtype))[: len(rows)]
                return Neighbours(start, _similarity_of(keys), _INDEX_MASK - (keys & _INDEX_MASK))

        with _full_precision():  # of all threads, until the last part is taken
            yield from _side_by_side(neighbours, range(0, len(queries), size), self.num_threads)

    def _best(self, queries: Tensor) -> Tensor:
        """[q filled up, D] -> keys [q, k], largest first."""
        workspace = self._workspaces.get()
        try:
            return self._best_in(workspace, queries)
        finally:
            self._workspaces.put(workspace)

    def _best_in(self, workspace: _Workspace, queries: Tensor) -> Tensor:
        candidates = workspace.candidates.of_new_queries(len(queries))
        for begin in range(0, len(self.bank), self.block_rows):
            tiles, maxima = self._tiles(workspace.buffer, queries, begin)
            if begin == 0:
                candidates.bound = _lower_bound(tiles, maxima, self.k)
            for i, tile in enumerate(tiles):
                candidates.add(tile, maxima[i], begin + i * self.tile_rows)
            candidates.reduce()
        return candidates.finish()

    def _tiles(self, buffer: Tensor, queries: Tensor, begin: int) -> tuple[list[Tensor], list[Tensor]]:
        """The similarities of a block, [q, tile_rows] each, the last one maybe narrower, and the maxima of their groups."""
        end = min(begin + self.block_rows, len(self.bank))
        tiles, maxima = [], []
        for start in range(begin, end, self.tile_rows):
            rows = self.bank[start : min(start + self.tile_rows, end)]
            # Each tile contiguous: products are written faster than into columns of a wide matrix.
            used = (start - begin) * len(queries)
            tile = buffer[used : used + len(queries) * len(rows)].view(len(queries), len(rows))
            torch.mm(queries, rows.T, out=tile)
            tile[:, max(0, self.num_rows - start) :] = -torch.inf  # rows that only fill up
            tiles.append(tile)
            maxima.append(tile.unflatten(1, (-1, _GROUP)).amax(dim=2))  # now, while the tile is in the cache
        return tiles, maxima


def _lower_bound(tiles: list[Tensor], maxima: list[Tensor], k: int) -> Tensor:
    """[q, 1] float32, just below a value that at least ``k`` similarities of each query reach."""
    parts = maxima if sum(part.shape[1] for part in maxima) >= k else tiles
    values = torch.cat(parts, dim=1)
    while values.shape[1] > 4 * k and values.shape[1] % 2 == 0:  # maxima of larger groups: a lower bound faster
        values = torch.maximum(*values.chunk(2, dim=1))
    if values.shape[1] < k:
        return torch.full((len(values), 1), -torch.inf, device=values.device)
    reached = values.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True).float()
    return reached.nextafter(torch.full_like(reached, -torch.inf))


class _Candidates:
    """Similarities above a bound of their query, as keys; the best k and those found since.

    A key is an integer that orders by similarity, then by index. Blocks come in the order of the bank, so what equals the
    k-th best found before comes after it, and "above" may be strict.
    """

    def __init__(self, most_queries: int, k: int, most_added: int, device: torch.device) -> None:
        self.k = k
        # Beyond the first ``num`` of a query there are lowest keys only.
        self._keys = torch.full((most_queries, 2 * k + most_added), _LOWEST_KEY, device=device)

    def of_new_queries(self, num_queries: int) -> _Candidates:
        """Forget what was found for others."""
        self.keys = self._keys[:num_queries]
        self.keys[:, : self.k] = _LOWEST_KEY
        self.num = torch.zeros(num_queries, dtype=torch.int64, device=self.keys.device)
        self.bound = torch.full((num_queries, 1), -torch.inf, device=self.keys.device)
        return self

    def add(self, tile: Tensor, maxima: Tensor, first_index: int) -> None:
        """[q, n] similarities of the bank from ``first_index`` on, [q, n / _GROUP] the maximum of each group."""
        num_groups = maxima.shape[1]
        group = (maxima > self.bound).flatten().nonzero().squeeze(1)  # of all groups of all queries
        opened = tile.view(-1, _GROUP).index_select(0, group).float()  # [groups, _GROUP]
        bound = self.bound.index_select(0, group // num_groups)
        found = (opened > bound).flatten().nonzero().squeeze(1)
        group = group.index_select(0, found // _GROUP)
        row = group // num_groups  # ascending
        index = group % num_groups * _GROUP + found % _GROUP + first_index
        num_new = torch.bincount(row, minlength=len(self.num))
        place = torch.arange(len(row), device=row.device) + (self.num - (num_new.cumsum(0) - num_new))[row]
        self.keys.view(-1)[row * self.keys.shape[1] + place] = _keys(opened.flatten().index_select(0, found), index)
        self.num += num_new
        if int(self.num.max()) > 2 * self.k:
            self.reduce()

    def reduce(self) -> None:
        """Keep the k best, and raise the bound to the k-th."""
        width = max(self.k, int(self.num.max()))
        best = self.keys[:, :width].topk(self.k, dim=1, sorted=False).values
        self.keys[:, : self.k] = best
        self.keys[:, self.k : width] = _LOWEST_KEY
        self.num.fill_(self.k)  # where fewer were found, the rest are lowest keys somewhere among them
        last = best.amin(1, keepdim=True)
        self.bound = torch.where(last > _LOWEST_KEY, _similarity_of(last), self.bound)

    def finish(self) -> Tensor:
        """[q, k], largest first."""
        return self.keys[:, : self.k].sort(dim=1, descending=True).values


def _unit_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of length 1, and rows of zeros up to a multiple of _ROWS_STEP."""
    unit = F.normalize(rows.detach().float(), dim=1).to(dtype)
    return F.pad(unit, (0, 0, 0, -len(rows) % _ROWS_STEP))


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products in float32 on CUDA, too; FLOAT32_PRECISION would let them be TF32, with the mantissa of float16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _side_by_side(
    function: Callable[[int], Neighbours], arguments: Sequence[int], num_threads: int
) -> Iterator[Neighbours]:
    """The results in the order of the arguments; at most two for each thread are held."""
    if num_threads == 1 or len(arguments) < 2:
        yield from map(function, arguments)
        return
    # A thread of the pool computes with one thread. torch takes that number for all threads that start later, too.
    before = torch.get_num_threads()
    with ThreadPoolExecutor(num_threads, "k-NN", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting: deque[Future[Neighbours]] = deque()
        try:
            for argument in arguments:
                waiting.append(pool.submit(function, argument))
                if len(waiting) == 2 * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            torch.set_num_threads(before)


def _steps(rows: int) -> int:
    """The multiple of _ROWS_STEP up to ``rows``, at least one step."""
    return max(1, rows // _ROWS_STEP) * _ROWS_STEP


def _steps_up(rows: int) -> int:
    """The multiple of _ROWS_STEP from ``rows`` on, at least one step."""
    return _steps(rows + _ROWS_STEP - 1)


def _keys(similarity: Tensor, index: Tensor) -> Tensor:
    """int64: the bits of a float32 in the order of its value, then the complement of the index."""
    bits = (similarity + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0, which it equals
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (_INDEX_MASK - index)


def _similarity_of(keys: Tensor) -> Tensor:
    ordered = (keys >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
