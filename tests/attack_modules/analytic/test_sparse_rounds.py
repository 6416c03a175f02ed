"""Features from the zeros that they have behind a ReLU, whatever the training of the head is."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.joint_rounds import StackedRounds
from attack_modules.analytic.sparse_rounds import SparseSolution, ZeroSearch, sparse_rounds

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
def found(truth: tuple) -> SparseSolution:
    return sparse_rounds(truth[1])


def test_all_images_come_out_of_mini_batches_momentum_and_changing_peers(truth: tuple, found: SparseSolution) -> None:
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


def test_features_that_may_be_negative_are_not_found() -> None:
    rounds, _ = federate(normal_features())
    assert rounds.num_images == len(LABELS)
    assert len(sparse_rounds(rounds).features) == 0
