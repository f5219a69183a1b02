from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dinoengine.evaluation import neighbours
from dinoengine.evaluation.neighbours import NeighbourSearch


def _found(bank: Tensor, queries: Tensor, k: int, **options: int) -> tuple[Tensor, Tensor]:
    parts = list(NeighbourSearch(bank, k, **options).search(queries))
    assert [part.start for part in parts] == [sum(len(p.indices) for p in parts[:i]) for i in range(len(parts))]
    return torch.cat([part.similarity for part in parts]), torch.cat([part.indices for part in parts])


def _slow(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Every similarity in float64, sorted; equal ones in the order of the bank."""
    similarity = F.normalize(queries.double(), dim=1) @ F.normalize(bank.double(), dim=1).T
    values, index = similarity.sort(dim=1, descending=True, stable=True)
    return values[:, :k].float(), index[:, :k]


def _rows(seed: int, num: int, dim: int) -> Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "num_bank, num_queries, k", [(1, 1, 1), (63, 5, 63), (65, 64, 7), (3000, 130, 1), (3000, 9, 700)]
)
@pytest.mark.parametrize("memory_mib", [1, 256])
def test_neighbours_are_those_of_a_full_sort(num_bank: int, num_queries: int, k: int, memory_mib: int) -> None:
    bank, queries = _rows(0, num_bank, 12), _rows(1, num_queries, 12)
    values, index = _found(bank, queries, k, memory_mib=memory_mib)
    expected_values, expected = _slow(bank, queries, k)
    torch.testing.assert_close(values, expected_values, rtol=0, atol=1e-6)
    # Two similarities that differ by less than rounding may change places.
    assert (index != expected).float().mean() < 1e-3


def test_every_row_nearer_than_all_before_it() -> None:
    angles = torch.linspace(1.5, 0.5, 5000)
    bank = torch.stack((angles.cos(), angles.sin()), dim=1)
    queries = torch.tensor([[1.0, 0.0]]).expand(1100, 2)
    assert _found(bank, queries, 3, memory_mib=1)[1].unique(dim=0).tolist() == [[4999, 4998, 4997]]
    assert _found(bank.flip(0), queries, 3, memory_mib=1)[1].unique(dim=0).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("memory_mib", [1, 3, 256])
@pytest.mark.parametrize("dim", [1, 7, 384])
def test_equal_rows_come_in_the_order_of_the_bank_whatever_the_blocks(dim: int, memory_mib: int) -> None:
    bank = _rows(0, 37, dim).repeat(90, 1)  # 3330 rows; copy c of row r is number 37 c + r
    queries = _rows(1, 1030, dim)
    values, index = _found(bank, queries, 120, memory_mib=memory_mib)
    copies = values[:, 1:] == values[:, :-1]
    assert copies.float().mean() > 0.9
    assert (index[:, 1:] > index[:, :-1])[copies].all()
    assert torch.equal(index, _found(bank, queries, 120, memory_mib=64)[1])


def test_a_collapsed_bank_gives_its_first_rows() -> None:
    ones = torch.ones(20_000, 8)
    _, index = _found(ones, ones[:70], 10, memory_mib=1)
    assert index.unique(dim=0).tolist() == [list(range(10))]


def test_orthogonal_rows_tie_at_zero_whatever_its_sign() -> None:
    bank = torch.tensor([[0.0, -1.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 2.0]])
    values, index = _found(bank, torch.tensor([[1.0, 0.0], [-1.0, -0.0]]), 4)
    assert index.tolist() == [[0, 1, 3, 2], [2, 0, 1, 3]]
    assert values.tolist() == [[0.0, 0.0, 0.0, -1.0], [1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("step", [1, 3, 64, 1000])
def test_queries_asked_for_alone_get_the_same_bits(step: int) -> None:
    bank, queries = _rows(0, 2500, 384), _rows(1, 1100, 384)
    whole = _found(bank, queries, 20, memory_mib=2)
    for start in (0, 7, 1099):
        values, index = _found(bank, queries[start : start + step], 20)
        assert torch.equal(values, whole[0][start : start + step])
        assert torch.equal(index, whole[1][start : start + step])


def test_few_candidates_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    keys = neighbours._keys
    monkeypatch.setattr(neighbours, "_keys", lambda values, index: seen.append(len(values)) or keys(values, index))
    _found(_rows(0, 60_000, 4), _rows(1, 64, 4), 50)
    assert sum(seen) < 64 * 3 * 50  # of 64 * 60,000


@pytest.mark.parametrize("k", [0, 4, -1])
def test_k_beyond_the_bank_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must be 1 to 3, the number of rows of the bank; got {k}\."):
        NeighbourSearch(torch.eye(3), k)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_num_threads(before[0])
    torch.set_float32_matmul_precision(before[1])


@pytest.mark.parametrize("inference", [False, True])
def test_two_threads_find_what_one_finds_bit_by_bit(two_threads: None, inference: bool) -> None:
    bank, queries = _rows(0, 3000, 24), _rows(1, 1500, 24)
    with torch.inference_mode(inference):
        values, index = _found(bank, queries, 50, memory_mib=2)
    torch.set_num_threads(1)
    one_values, one_index = _found(bank, queries, 50, memory_mib=2)
    assert torch.equal(values, one_values)
    assert torch.equal(index, one_index)


def test_torch_has_its_threads_again_after_the_search_whole_or_not(two_threads: None) -> None:
    search = NeighbourSearch(_rows(0, 100, 4), 3, memory_mib=1)
    parts = search.search(_rows(1, 3000, 4))
    next(parts)
    assert torch.get_float32_matmul_precision() == "highest"
    parts.close()  # type: ignore[attr-defined]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2
    assert torch.get_num_threads() == 2
    assert torch.get_float32_matmul_precision() == "high"
    assert len(torch.cat([part.indices for part in search.search(_rows(1, 3000, 4))])) == 3000


def test_an_error_in_a_block_reaches_the_caller(two_threads: None) -> None:
    search = NeighbourSearch(_rows(0, 100, 4), 3, memory_mib=1)
    for _ in range(2):  # the second would wait for ever if the first had kept what it works in
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            list(search.search(_rows(1, 3000, 5)))
