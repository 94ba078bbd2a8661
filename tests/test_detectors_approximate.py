"""KNN by an approximate index: faiss where it is installed, else a stand-in that searches lists as it does."""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch

from ood_fast.checks import UserError
from ood_fast.detectors import KNN, DetectorSet, load

try:
    import faiss
except ImportError:
    faiss = None


class Lists:
    """IndexIVFFlat: centres are the first rows."""

    def __init__(self, quantiser, m, n_lists):
        self.n_lists, self.cp = n_lists, types.SimpleNamespace()

    def train(self, rows):
        self.centres = rows[: self.n_lists]

    def add(self, rows):
        self.rows, self.of = rows, self._near(rows)[:, 0]

    def _near(self, rows):
        return ((rows[:, None] - self.centres[None]) ** 2).sum(2).argsort(1)

    def search(self, queries, k, params):
        squared, found = np.full((len(queries), k), 3e38, np.float32), np.full((len(queries), k), -1)
        for place, (query, lists) in enumerate(zip(queries, self._near(queries)[:, : params.nprobe], strict=True)):
            rows = np.isin(self.of, lists).nonzero()[0]
            distances = ((self.rows[rows] - query) ** 2).sum(1)
            order = distances.argsort(kind="stable")[:k]
            squared[place, : len(order)], found[place, : len(order)] = distances[order], rows[order]
        return squared, found


@pytest.fixture(params=["faiss", "stand-in"])
def index(request, monkeypatch):
    if request.param == "faiss":
        return faiss or pytest.skip("faiss is not installed")
    module = types.ModuleType("faiss")
    module.__spec__ = ModuleSpec("faiss", None)
    module.IndexFlatL2, module.IndexIVFFlat = lambda m: None, Lists
    module.SearchParametersIVF = types.SimpleNamespace
    monkeypatch.setitem(sys.modules, "faiss", module)
    return module


@pytest.fixture
def z():
    return torch.randn(400, 6, generator=torch.Generator().manual_seed(1))


def test_all_lists_are_exact(index, z):
    for settings in ({}, {"squared": False, "alpha": 0.1}, {"dtype": torch.float16}):
        exact = KNN(k=7, **settings).fit_features(z[:300])
        with pytest.warns(UserWarning, match=r"KNN: probes=99 of 17 lists find 100\.0 % of the 7 nearest training"):
            near = KNN(k=7, probes=99, **settings).fit_features(z[:300])
        torch.testing.assert_close(near.score_features(z[300:]), exact.score_features(z[300:]), rtol=1e-4, atol=1e-5)
        assert near.recall == 1


@pytest.mark.filterwarnings("ignore:KNN. probes")
def test_few_lists_find_most_and_say_how_many(index, z, tmp_path):
    exact, near = (KNN(k=7, probes=probes).fit_features(z[:300]) for probes in (None, 4))
    assert 0.3 < near.recall < 1
    assert exact.recall is None
    found, true = near.score_features(z[300:]), exact.score_features(z[300:])
    assert (found <= true + 1e-5).all()  # what is not found leaves one that is further off
    assert (found < true - 1e-5).any()
    near.calibrate(found).save(tmp_path / "it")
    back = load(tmp_path / "it")
    assert back.recall == near.recall
    torch.testing.assert_close(back.score_features(z[300:]), found)
    both = DetectorSet({"a": KNN(k=7), "b": KNN(k=7, probes=4)}).fit_features(z[:300])
    torch.testing.assert_close(both.score_features(z[300:])["b"], found)


@pytest.mark.filterwarnings("ignore:KNN. probes")
def test_lists_with_fewer_than_k_rows(index, z):
    exact, near = (KNN(k=120, probes=probes).fit_features(z[:300]) for probes in (None, 1))
    torch.testing.assert_close(near.score_features(z[300:]), exact.score_features(z[300:]), rtol=1e-4, atol=1e-5)


def test_without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"probes: an approximate index needs faiss-cpu, .* pip install faiss-cpu"):
        KNN(probes=8)
    with pytest.raises(ValueError, match="probes: got 0, expected an int >= 1, or None"):
        KNN(probes=0)
