"""Features of a head of several layers by zeros, where each image found is taken out of the rounds."""

import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.fewer_images import Proof, fewer_images
from attack_modules.analytic.sparse_rounds import MORE, sparse_rounds
from attack_modules.analytic.stacked_rounds import StackedRounds

IMAGES, WIDTH, HIDDEN, CLASSES, ROUNDS, RATE, SMOOTHING = 40, 96, 48, 6, 4, 0.5, 0.1
LABELS = torch.arange(IMAGES) % CLASSES


def federate() -> tuple[Tensor, StackedRounds, list[tuple[Tensor, Tensor]]]:
    """Features (N, D), a third of whose rows have fewer zeros than there are images, and float32 rounds of them."""
    generator = torch.Generator().manual_seed(5)
    shift = torch.where(torch.arange(IMAGES) % 3 == 0, 0.35, -0.4)[:, None]
    features = 6 * F.normalize((torch.randn(IMAGES, WIDTH, generator=generator) + shift).relu(), dim=1)
    inputs = torch.cat([features, torch.ones(IMAGES, 1)], 1)
    targets = F.one_hot(LABELS, CLASSES) * (1 - SMOOTHING) + SMOOTHING / CLASSES
    first, last = (
        torch.randn(out, width + 1, generator=generator) / width**0.5
        for out, width in ((HIDDEN, WIDTH), (CLASSES, HIDDEN))
    )
    models = [(first, last)]
    for _ in range(ROUNDS):
        outputs = inputs @ first.T
        hidden = torch.cat([outputs.relu(), torch.ones(IMAGES, 1)], 1)
        errors = ((hidden @ last.T).softmax(1) - targets) / IMAGES
        back = errors @ last[:, :-1] * (outputs > 0)
        first, last = first - RATE * back.T @ inputs, last - RATE * errors.T @ hidden
        models.append((first, last))
    stacked = torch.stack([first for first, _ in models]).double()
    return features, StackedRounds.of(stacked[:-1], (stacked[:-1] - stacked[1:]) / RATE, biased=True), models[:-1]


def test_images_with_fewer_zeros_than_there_are_images_come_out_once_others_are_taken_out() -> None:
    features, rounds, layers = federate()
    few = (features == 0).sum(1) < MORE * IMAGES
    assert 5 < few.sum() < IMAGES / 2
    found = fewer_images(rounds, layers, SMOOTHING)
    distances, nearest = torch.cdist(features.double(), found.features).min(1)
    errors = distances / features.norm(dim=1)
    assert sorted(nearest.tolist()) == list(range(IMAGES))
    assert errors.max() < 0.01
    assert torch.equal(found.labels[nearest], LABELS)
    assert found.certified.all()
    assert 0.2 < (errors / found.expected_errors[nearest]).median() < 3
    assert len(sparse_rounds(rounds).labels) <= IMAGES - few.sum()
    assert not len(fewer_images(rounds, layers).labels)  # labels are smoothed
    wrong = Proof.of(features.flip(1), layers, rounds.left, SMOOTHING)
    assert wrong.outside.min() > 0.1


def test_rounds_less_some_images_are_those_of_the_others() -> None:
    features, rounds, layers = federate()
    proof = Proof.of(features, layers, rounds.left, SMOOTHING)
    assert torch.equal(proof.labels, LABELS)
    rest = rounds.without(proof.errors[:, :30])
    others = torch.cat([features[30:], torch.ones(10, 1)], 1).double()
    assert rest.num_images == 10
    assert (others - others @ rest.basis.T @ rest.basis).norm() < 1e-3 * others.norm()
    torch.testing.assert_close(rest.weights @ rest.basis, rounds.weights @ rounds.basis @ rest.basis.T @ rest.basis)
    torch.testing.assert_close(rest.left.T @ rest.left, torch.eye(10).double())
