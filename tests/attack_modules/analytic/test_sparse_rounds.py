"""Features from the zeros that they have behind a ReLU, whatever the training of the head is."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.sparse_rounds import ZeroSearch, solution_of, sparse_rounds
from attack_modules.analytic.stacked_rounds import FoundImages, StackedRounds

CLASSES, WIDTH, PEERS, EACH, ROUNDS, RATE = 4, 256, 4, 3, 14, 0.02
LABELS = torch.tensor([0, 0, 1, 0, 1, 1, 2, 0, 3, 3, 2, 2])


def federate(features: Tensor) -> tuple[StackedRounds, Tensor]:
    """Two local epochs in batches of 2 with momentum, of 2 of 4 peers in each round; and (R, N) who was there."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.cat([features, torch.ones(len(features), 1)], 1)
    weights, presence = [0.02 * torch.randn(CLASSES, WIDTH + 1, generator=generator)], []
    for _ in range(ROUNDS):
        sampled = torch.randperm(PEERS, generator=generator)[:2]
        presence.append(torch.isin(torch.arange(PEERS).repeat_interleave(EACH), sampled))
        total = torch.zeros_like(weights[0])
        for peer in sampled.tolist():
            local, velocity = weights[-1], torch.zeros_like(total)
            for _ in range(2):
                for batch in (EACH * peer + torch.randperm(EACH, generator=generator)).split(2):
                    errors = (inputs[batch] @ local.T).softmax(1) - F.one_hot(LABELS[batch], CLASSES)
                    velocity = 0.5 * velocity + errors.T @ inputs[batch] / len(batch)
                    local = local - RATE * velocity
            total = total + (local - weights[-1]) / 2
        weights.append(weights[-1] + total)
    stacked = torch.stack(weights).double()
    return StackedRounds.of(stacked[:-1], (stacked[:-1] - stacked[1:]) / RATE, biased=True), torch.stack(presence)


def normal_features() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(len(LABELS), WIDTH, generator=generator) + 0.5 * torch.randn(WIDTH, generator=generator)


@pytest.fixture(scope="module")
def truth() -> tuple[Tensor, StackedRounds, Tensor]:
    features = normal_features().relu()
    return features, *federate(features)


@pytest.fixture(scope="module")
def found(truth: tuple) -> FoundImages:
    return sparse_rounds(truth[1])


def test_all_images_come_out_of_mini_batches_momentum_and_changing_peers(truth: tuple, found: FoundImages) -> None:
    features, rounds, presence = truth
    assert rounds.num_images == len(LABELS)
    errors, nearest = torch.cdist(features.double(), found.features).min(1)
    errors = errors / features.norm(dim=1)
    assert sorted(nearest.tolist()) == list(range(len(LABELS)))
    assert errors.max() < 0.01
    assert torch.equal(found.labels[nearest], LABELS)
    assert torch.equal(found.presence[:, nearest], presence)
    assert found.certified.all()
    assert 0.5 < (errors / found.expected_errors[nearest]).median() < 2


def test_sums_of_images_and_images_under_more_noise_than_tells_them_apart_are_not_certified(truth: tuple) -> None:
    features, rounds, _ = truth
    search = ZeroSearch(rounds)
    image, other = (torch.linalg.lstsq(search.scaled.T, features[i].double()).solution for i in (0, 1))
    assert search.certify(image) is not None
    assert search.certify(-image) is not None  # of either sign
    assert search.certify(image + other) is None
    assert search.certify(image - other) is None
    assert ZeroSearch(replace(rounds, noise=1e6 * rounds.noise)).certify(image) is None


def test_features_lead_to_many_images_in_each_sweep() -> None:
    generator = torch.Generator().manual_seed(0)
    images = (
        torch.randn(64, 320, generator=generator) + 0.7 * torch.randn(4, 320, generator=generator).repeat(16, 1)
    ).relu()
    errors = torch.randn(26, 4, 64, generator=generator).double()
    inputs = torch.cat([images, torch.ones(64, 1)], 1).double()
    noise = 1e-5 * torch.randn(26, 4, 321, generator=generator)
    search = ZeroSearch(StackedRounds.of(torch.zeros(26, 4, 321), errors @ inputs + noise, biased=True))
    for _ in range(4):  # 26 in all; along random directions, 2
        search.found += search.sweep()
    found = solution_of(search).features
    distances, nearest = torch.cdist(images.double(), found).min(1)
    right = distances < 0.01 * images.norm(dim=1)
    assert nearest[right].unique().numel() == len(found) == right.sum() > 16


def test_a_single_image_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 64, generator=generator).relu()
    errors = torch.randn(6, 3, 1, generator=generator).double()
    inputs = torch.cat([image, torch.ones(1, 1)], 1).double()
    noise = 1e-6 * torch.randn(6, 3, 65, generator=generator)
    rounds = StackedRounds.of(torch.zeros(6, 3, 65), errors * inputs + noise, biased=True)
    found = sparse_rounds(rounds)
    torch.testing.assert_close(found.features.float(), image, rtol=1e-3, atol=1e-5)


def test_features_that_may_be_negative_are_not_found() -> None:
    rounds, _ = federate(normal_features())
    assert rounds.num_images == len(LABELS)
    assert len(sparse_rounds(rounds).features) == 0
