"""Approximate search by other libraries, over inner products with the bias as one more coordinate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

__all__ = ["Rival", "find_rivals"]

Search = Callable[
    [np.ndarray, int], np.ndarray
]  # queries (n, d + 1) with a 1 appended, k -> ids (n, k)


@dataclass(frozen=True)
class Rival:
    """An index at one setting of what trades recall for speed."""

    family: str
    setting: int
    build_seconds: float
    search: Search


def find_rivals(points: np.ndarray, threads: int, seed: int) -> tuple[list[Rival], dict[str, str]]:
    """Indexes over ``points`` (N, d + 1) by the libraries that are installed, and why others have none."""
    found: list[Rival] = []
    missing = {}
    for package, make in (("faiss", faiss_rivals), ("hnswlib", hnswlib_rivals)):
        try:
            found += make(points, threads, seed)
        except ImportError as error:
            missing[package] = str(error)
    return found, missing


def faiss_rivals(points: np.ndarray, threads: int, seed: int) -> Iterator[Rival]:
    """An inverted file of 2 sqrt(N) lists, and a graph."""
    import faiss

    faiss.omp_set_num_threads(threads)
    lists, width = round(2 * len(points) ** 0.5), points.shape[1]
    started = time.perf_counter()
    ivf = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
    ivf.cp.seed = seed
    ivf.train(points)
    ivf.add(points)
    seconds = time.perf_counter() - started

    def search_lists(x: np.ndarray, k: int, nprobe: int) -> np.ndarray:
        ivf.nprobe = nprobe
        return ivf.search(x, k)[1]

    for nprobe in (4, 16, 64, 128, 256):
        yield Rival("faiss IVF-Flat", nprobe, seconds, partial(search_lists, nprobe=nprobe))
    started = time.perf_counter()
    hnsw = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
    hnsw.add(points)
    seconds = time.perf_counter() - started

    def search_graph(x: np.ndarray, k: int, ef: int) -> np.ndarray:
        hnsw.hnsw.efSearch = ef
        return hnsw.search(x, k)[1]

    for ef in (16, 64, 256, 1024):
        yield Rival("faiss HNSW", ef, seconds, partial(search_graph, ef=ef))


def hnswlib_rivals(points: np.ndarray, threads: int, seed: int) -> Iterator[Rival]:
    """A graph."""
    import hnswlib

    started = time.perf_counter()
    graph = hnswlib.Index("ip", points.shape[1])
    graph.init_index(len(points), ef_construction=200, M=16, random_seed=seed)
    graph.add_items(points, num_threads=threads)
    seconds = time.perf_counter() - started

    def search(x: np.ndarray, k: int, ef: int) -> np.ndarray:
        graph.set_ef(ef)
        return graph.knn_query(x, k, num_threads=threads)[0].astype(np.int64)

    for ef in (16, 64, 256, 1024):
        yield Rival("hnswlib", ef, seconds, partial(search, ef=ef))
