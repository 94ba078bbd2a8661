"""Heads made of text: the layer by its definition, what reads it, GL-MCM place by place, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import ood_fast
from ood_fast import heads, reference
from ood_fast.detectors import MCM, BoundaryDistance
from ood_fast.text import TextClassifier, text_head

C, T, M = 4, 3, 6


def unit(row):
    length = math.sqrt(sum(v * v for v in row))
    return [v / length for v in row]


def test_a_row_is_the_scaled_direction_of_the_mean_of_directions():
    prompts = torch.randn(C, T, M) * torch.rand(C, T, 1) * 10
    head = text_head(prompts, scale=7.0)
    assert torch.equal(text_head(prompts, scale=torch.tensor(7.0, requires_grad=True)).weight, head.weight)
    for row, of_class in zip(head.weight.tolist(), prompts.tolist(), strict=True):
        means = [sum(column) / T for column in zip(*map(unit, of_class), strict=True)]
        assert row == pytest.approx([7 * v for v in unit(means)], abs=1e-5)
    assert head.bias is None
    one = text_head(prompts[:, 0])
    torch.testing.assert_close(one.weight, text_head(list(prompts[:, :1])).weight)
    torch.testing.assert_close(one.weight.norm(dim=1), torch.full((C,), 100.0))


def test_what_reads_a_head_reads_this_one():
    encoder = nn.Linear(5, M)
    model = TextClassifier(encoder, torch.randn(C, M), scale=20.0)
    x, y = torch.randn(8, 5), torch.arange(8) % C
    z = nn.functional.normalize(encoder(x), dim=1)
    W = model.head.weight
    torch.testing.assert_close(model(x), 20 * nn.functional.cosine_similarity(z[:, None], W, dim=2))
    assert heads.find_head(model) is model.head
    with heads.capture_features(model.head) as captured:
        model(x)
    torch.testing.assert_close(captured.features, z)
    loss = ood_fast.ELogitNormLoss(model.head)(model(x), y)
    torch.testing.assert_close(loss, reference.elogitnorm(model(x), None, W, None, y))
    loss.backward()
    assert encoder.weight.grad.abs().sum() > 0
    half = TextClassifier(lambda x: encoder(x).half(), W.detach(), scale=20.0)  # as CLIP on a GPU
    torch.testing.assert_close(half(x), model(x), rtol=5e-3, atol=5e-2)
    # D is in the unit of the embeddings: the scale leaves it as it is
    louder = TextClassifier(encoder, W.detach(), scale=100.0)
    distances = [ood_fast.boundary_distance(made(x), made.head.weight) for made in (model, louder)]
    torch.testing.assert_close(*distances)
    scores = BoundaryDistance().fit_features(None, head=(W.detach(), None)).score_features(None, model(x))
    torch.testing.assert_close(scores, distances[0])


def test_gl_mcm_place_by_place():
    W, whole, places = torch.randn(C, M), torch.randn(5, M), torch.randn(5, 7, M)

    def best(row, temperature):
        matches = [sum(a * b for a, b in zip(unit(row), unit(w), strict=True)) / temperature for w in W.tolist()]
        exponentials = [math.exp(match) for match in matches]
        return max(exponentials) / sum(exponentials)

    detector = MCM(temperature=0.5, local=0.3).fit_features(None, head=(W, None))
    scores = detector.score_features(torch.cat([whole, places.flatten(1)], dim=1))
    expected = [
        best(image, 0.5) + 0.3 * max(best(place, 0.5) for place in own)
        for image, own in zip(whole.tolist(), places.tolist(), strict=True)
    ]
    assert scores.tolist() == pytest.approx(expected, rel=1e-5)
    for columns in (M, 2 * M + 1):
        with pytest.raises(ValueError, match=r"expected \(n, \(1 \+ places\) · 6\)"):
            detector.score_features(torch.randn(5, columns))
    with pytest.raises(ValueError, match="local: got -1"):
        MCM(local=-1.0)


@pytest.mark.parametrize(
    ("embeddings", "error", "said"),
    [
        (torch.zeros(C, M, dtype=torch.int64), TypeError, "embeddings: got dtype torch.int64"),
        (torch.randn(M), ValueError, r"embeddings: got shape \(6,\)"),
        (torch.randn(1, M), ValueError, "embeddings: got one class"),
        ([torch.randn(2, M), torch.randn(0, M)], ValueError, r"embeddings\[1\]: got shape \(0, 6\)"),
        ([torch.randn(2, M), torch.randn(2, 5)], ValueError, r"embeddings\[1\]: got shape \(2, 5\), expected \(t, 6\)"),
        (torch.zeros(C, M), ValueError, r"embeddings\[0\]: no direction"),
        (torch.full((C, M), float("nan")), ValueError, r"embeddings\[0\]: no direction"),
        (torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]] * 2), ValueError, r"embeddings\[0\]: no direction"),
    ],
)
def test_embeddings_that_make_no_head(embeddings, error, said):
    with pytest.raises(error, match=said):
        text_head(embeddings)
