"""Images one by one, from the errors that they leave in the rounds of a head over a frozen backbone."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.error_series import ErrorSearch, error_series
from attack_modules.analytic.stacked_rounds import StackedRounds

CLASSES, WIDTH, IMAGES, ROUNDS, RATE, SMOOTHING = 12, 64, 27, 12, 1.0, 0.1
LABELS = torch.arange(IMAGES) % (CLASSES - 1)  # one class has none


def federate() -> tuple[Tensor, StackedRounds]:
    """Features (N, D) that may be negative, and the rounds of float32 models that learn smoothed labels of them."""
    generator = torch.Generator().manual_seed(3)
    own = torch.randn(IMAGES, WIDTH, generator=generator) + 0.5 * torch.randn(WIDTH, generator=generator)
    features = 8 * F.normalize(own, dim=1)
    inputs = torch.cat([features, torch.ones(IMAGES, 1)], 1)
    targets = F.one_hot(LABELS, CLASSES) * (1 - SMOOTHING) + SMOOTHING / CLASSES
    weights = [0.05 * torch.randn(CLASSES, WIDTH + 1, generator=generator)]
    for _ in range(ROUNDS):
        errors = (inputs @ weights[-1].T).softmax(1) - targets
        weights.append(weights[-1] - RATE * errors.T @ inputs / IMAGES)
    stacked = torch.stack(weights).double()
    return features, StackedRounds.of(stacked[:-1], (stacked[:-1] - stacked[1:]) / RATE, biased=True)


@pytest.fixture(scope="module")
def truth() -> tuple[Tensor, StackedRounds]:
    return federate()


def test_all_images_of_shared_classes_come_out_and_how_far_off_they_are(truth: tuple) -> None:
    features, rounds = truth
    found = error_series(rounds, SMOOTHING)
    distances, nearest = torch.cdist(features.double(), found.features).min(1)
    errors = distances / features.norm(dim=1)
    assert sorted(nearest.tolist()) == list(range(IMAGES))
    assert errors.max() < 0.01
    assert torch.equal(found.labels[nearest], LABELS)
    assert found.certified.all()
    assert found.presence.shape == (ROUNDS, IMAGES)
    assert 0.2 < (errors / found.expected_errors[nearest]).median() < 2


def test_other_training_than_is_assumed_shows_nothing(truth: tuple) -> None:
    assert not len(error_series(truth[1]).labels)  # labels are not smoothed


def test_an_image_that_was_found_is_not_found_again_and_more_noise_makes_features_uncertain(truth: tuple) -> None:
    features, rounds = truth
    inputs = torch.cat([features, torch.ones(IMAGES, 1)], 1).double()
    own = torch.linalg.lstsq(rounds.basis.T, inputs.T).solution.T
    search = ErrorSearch(rounds, SMOOTHING)
    assert search.attempt(own[0], int(LABELS[0]))
    again = search.attempt(own[0], int(LABELS[0]))
    torch.testing.assert_close(search.coordinates[0] @ rounds.basis, inputs[0], rtol=1e-2, atol=1e-2)
    assert not again or (search.coordinates[1] - own[0]).norm() > 0.1 * own[0].norm()
    assert (search.duals()[0] @ own[1:].T).abs().max() < 1e-2
    for place in range(1, IMAGES):  # from nearby, the rest
        search.attempt(own[place], int(LABELS[place]))
    exact = search.solution()
    assert len(exact.labels) == IMAGES
    search.rounds = replace(rounds, noise=1e5 * rounds.noise)
    assert not len(search.solution().labels)
