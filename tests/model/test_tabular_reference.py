"""The compiled readers compute what the plain ones of `model.tabular.reference` compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.tabular import label_readers, mixer, number_kernels, readers, reference
from model.tabular.columns import MISSING, standardise
from model.tabular.config import HORIZONS
from model.tabular.mixer import Mixer, MixerWeights
from tests.model.tabular_cases import Array, stream

L = 3


@pytest.fixture(scope="module")
def scaled() -> tuple[Array, Array, Array]:
    x, y = stream(200)
    x[:, 3] = np.random.default_rng(1).standard_cauchy(200)
    x[np.isnan(x)] = MISSING
    z, queries, _ = standardise(x[:-1], x[-1:], np.arange(199))
    return z, queries[0], y[:-1]


def test_columns_on_one_scale() -> None:
    x, _ = stream(100)
    x[:, 2] = 7.0
    x[:, 3] = np.random.default_rng(1).standard_cauchy(100)
    x[np.isnan(x)] = MISSING
    z, queries, numbers = standardise(x[:-2], x[-2:], np.arange(98))
    expected, expected_queries, expected_numbers = reference.standardise(x[:-2], x[-2:])
    order = [expected_numbers.tolist().index(number) for number in numbers.tolist()]
    assert len(order) == len(expected_numbers)
    np.testing.assert_allclose(z, expected[:, order], atol=1e-4)
    np.testing.assert_allclose(queries, expected_queries[:, order], atol=1e-4)


def test_nearest_and_their_votes(scaled: tuple[Array, Array, Array]) -> None:
    z, query, y = scaled
    weights, prior = np.linspace(0.1, 1, z.shape[1]).astype(np.float32), np.full(L, 1 / L, np.float32)
    indices, distances = np.empty(readers.NEAREST, np.int64), np.empty(readers.NEAREST, np.float32)
    size = readers.nearest(z, query, weights, 20, indices, distances)
    expected, expected_distances = reference.nearest(z, query, weights, 20)
    assert indices[:size].tolist() == expected.tolist()
    out = np.empty(L, np.float32)
    readers.neighbours(y, indices, distances, size, 5, prior, out)
    np.testing.assert_allclose(out, reference.neighbours(y, expected, expected_distances, 5, prior), rtol=1e-4)


def test_bayes_discriminant_and_relevance(scaled: tuple[Array, Array, Array]) -> None:
    z, query, y = scaled
    K, prior, out = z.shape[1], np.array([0.2, 0.3, 0.5], np.float32), np.empty(L, np.float32)
    sums, squares, counts = (np.empty(shape, np.float32) for shape in ((L, K), (L, K), L))
    readers.class_moments(z, y, 0, sums, squares, counts)
    relevance = np.empty(K, np.float32)
    readers.relevances(sums, squares, counts, relevance)
    np.testing.assert_allclose(relevance, reference.relevances(z.astype(float), y), atol=1e-3)
    readers.gaussian_bayes(sums, squares, counts, prior, query, out)
    np.testing.assert_allclose(out, reference.gaussian_bayes(z, y, prior, query), atol=1e-3)
    readers.kernel_bayes(z, y, 0, counts, prior, query, out)
    np.testing.assert_allclose(out, reference.kernel_bayes(z, y, prior, query), atol=1e-3)
    factor = np.zeros((K, K), np.float32)
    readers.discriminant(z, y, 0, sums, counts, np.arange(K), prior, query, factor, out)
    expected, covariance = reference.discriminant(z, y, prior, query)
    np.testing.assert_allclose(out, expected, atol=1e-3)
    np.testing.assert_allclose(factor @ factor.T, covariance, atol=1e-3)
    whitened, _ = readers.whiten(z, query, np.arange(K), factor)
    np.testing.assert_allclose(whitened, np.linalg.solve(factor, z.T).T, atol=1e-3)


def test_forests_and_ridge(scaled: tuple[Array, Array, Array]) -> None:
    z, query, y = scaled
    prior, out = np.full(L, 1 / L, np.float32), np.empty(L, np.float32)
    readers.forest(z, y, 0, query, prior, 6, 5, 32, out)
    np.testing.assert_allclose(out, reference.forest(z, y, query, prior, 6, 5, 32), atol=1e-4)
    t = (z[:, 0] + z[:, 1] ** 2).astype(np.float32)
    mean = number_kernels.forest_mean(z, t, 0, query, 0.5, 6, 5, 32)
    assert mean == pytest.approx(reference.forest_mean(z, t, query, 0.5, 6, 5, 32), abs=1e-3)
    coefficients = np.zeros(z.shape[1] + 1, np.float32)
    number_kernels.ridge(z, t, 0, np.arange(z.shape[1]), 1.0, coefficients)
    np.testing.assert_allclose(coefficients, reference.ridge(z.astype(float), t, 1.0), atol=1e-3)


def test_the_mixer_is_its_network() -> None:
    rng = np.random.default_rng(0)
    network = Mixer(label_readers.E)
    probs = rng.dirichlet(np.ones(L), label_readers.E).astype(np.float32)
    losses = rng.random((label_readers.E, len(HORIZONS))).astype(np.float32)
    inputs = mixer.mixer_inputs(probs, losses, np.ones(3, np.float32), np.ones(mixer.GLOBALS, np.float32))
    weights, out = MixerWeights.of(network), np.empty(L, np.float32)
    mixer.mix(*weights[:5], probs, inputs, out)
    batch = torch.from_numpy(inputs)[None]
    expected = network(torch.from_numpy(probs)[None], batch, torch.ones(1, L, dtype=torch.bool))[0].exp()
    np.testing.assert_allclose(out, expected.detach().numpy(), atol=1e-4)
    shares = mixer.mixer_shares(*weights[:5], inputs)
    mean = network.mean(torch.from_numpy(probs[:, 0])[None], batch)
    assert float(shares @ probs[:, 0]) == pytest.approx(mean.item(), abs=1e-4)
