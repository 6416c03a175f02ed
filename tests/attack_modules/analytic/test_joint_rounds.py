"""Features from the rounds of a head over a frozen backbone."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.joint_rounds import (
    ClassMeans,
    JointProblem,
    LocalSteps,
    PairBlocks,
    direct_solve,
    expected_errors,
    iterative_solve,
    solve_rounds,
)
from attack_modules.analytic.stacked_rounds import StackedRounds
from attack_modules.attack import AttackError

CLASSES, WIDTH = 4, 64


def features_of(number: int) -> Tensor:
    """(N, D) float32 of norm 12, a fifth of its square common to all."""
    generator = torch.Generator().manual_seed(3)
    own = torch.randn(number, WIDTH, generator=generator) + 0.5 * torch.randn(WIDTH, generator=generator)
    return 12 * own / own.norm(dim=1, keepdim=True)


def federate(
    features: Tensor, labels: Tensor, rounds: int, rate: float = 0.05, steps: int = 1
) -> tuple[Tensor, Tensor]:
    """(R, C, D + 1) weights in float32 before each round, and the mean gradients that their differences show."""
    inputs = torch.cat([features, torch.ones(len(features), 1)], 1)
    weights = [0.1 * torch.randn(CLASSES, WIDTH + 1, generator=torch.Generator().manual_seed(1))]
    for _ in range(rounds):
        local = weights[-1]
        for _ in range(steps):
            errors = (inputs @ local.T).softmax(1) - F.one_hot(labels, CLASSES)
            local = local - rate * errors.T @ inputs / len(labels)
        weights.append(local)
    stacked = torch.stack(weights).double()
    return stacked[:-1], (stacked[:-1] - stacked[1:]) / rate


@pytest.fixture(scope="module")
def nine() -> tuple[Tensor, Tensor, StackedRounds]:
    features, labels = features_of(9), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3])
    return features, labels, StackedRounds.of(*federate(features, labels, 12), biased=True)


def test_the_rank_is_the_number_of_images_and_the_bias_tells_the_counts(nine: tuple) -> None:
    _, labels, rounds = nine
    assert rounds.num_images == 9
    assert rounds.gap > 50
    assert torch.equal(ClassMeans.of(rounds).counts, labels.bincount())


def test_all_features_come_out_and_the_certificate_knows_how_far_off_they_are(nine: tuple) -> None:
    features, labels, rounds = nine
    found = solve_rounds(rounds, starts=6)
    errors, nearest = torch.cdist(features.double(), found.features).min(1)
    errors = errors / features.norm(dim=1)
    assert errors.max() < 0.01
    assert nearest.unique().numel() == 9
    assert torch.equal(found.labels[nearest], labels)
    assert found.certified.all()
    assert errors.max() < 5 * found.expected_errors.max() < 0.05


def test_several_local_steps_are_simulated() -> None:
    features, labels = features_of(6), torch.tensor([0, 0, 0, 1, 1, 2])
    rounds = StackedRounds.of(*federate(features, labels, 16, steps=3), biased=True)
    found = solve_rounds(rounds, training=LocalSteps(3, 0.05), starts=3)
    errors, nearest = (torch.cdist(features.double(), found.features) / 12).min(1)
    assert errors.max() < 0.01
    assert torch.equal(found.labels[nearest], labels)
    assert found.certified.all()


def test_wrong_features_are_not_explained(nine: tuple) -> None:
    found = solve_rounds(nine[2], starts=1, iterations=3)
    assert found.residual > 10
    assert not found.certified.any()


@pytest.mark.parametrize("steps", [1, 3])
def test_the_derivatives_are_right_and_both_solvers_agree(nine: tuple, steps: int) -> None:
    _, labels, rounds = nine
    problem = JointProblem(rounds, labels, training=LocalSteps(steps, 0.02))
    generator = torch.Generator().manual_seed(5)
    at = problem.point(ClassMeans.of(rounds).start(labels, generator, 0.3))
    step = 1e-6 * torch.randn(9, 9, generator=generator, dtype=torch.float64)
    ahead = problem.point(at.coordinates + step @ at.coordinates)
    linear = problem.forward(at, step)
    torch.testing.assert_close(ahead.residual - at.residual, linear[0], rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(ahead.ones - at.ones, linear[1], rtol=1e-3, atol=1e-8)
    back = problem.backward(at, *linear)
    torch.testing.assert_close(problem.normal_matrix(at) @ step.reshape(-1), back.reshape(-1))
    metric = at.coordinates @ at.coordinates.T
    right = problem.backward(at, at.residual, at.ones)
    torch.testing.assert_close(problem.normal(at, step), back)
    solution = iterative_solve(problem, at, tolerance=1e-8)(right, 1e-3)
    exact = problem.backward(at, *problem.forward(at, solution)) + 1e-3 * metric @ solution @ metric
    torch.testing.assert_close(exact, right, rtol=1e-4, atol=1e-4 * right.abs().max().item())
    rows, columns = torch.tensor([0, 1, 2, 8, 8, 8]), torch.tensor([8, 8, 8, 0, 1, 2])  # of classes 0 and 3
    damped = problem.normal_block(at, rows, columns)
    damped += 1e-3 * metric[rows][:, rows] * metric[columns][:, columns]
    by_blocks = PairBlocks(problem, at).inverse(1e-3)(right)
    torch.testing.assert_close(damped @ by_blocks[rows, columns], right[rows, columns])
    factorised = direct_solve(problem, at)(right, 1e-3)
    exact = problem.backward(at, *problem.forward(at, factorised)) + 1e-3 * factorised @ metric * metric.trace() / 9
    torch.testing.assert_close(exact, right, rtol=1e-4, atol=1e-4 * right.abs().max().item())


def test_expected_errors_grow_with_the_noise(nine: tuple) -> None:
    features, labels, rounds = nine
    problem = JointProblem(rounds, labels)
    inputs = torch.cat([features, torch.ones(9, 1)], 1).double()
    at = problem.point(inputs @ rounds.basis.T)
    few = expected_errors(problem, at, torch.Generator().manual_seed(0))
    noisier = JointProblem(replace(rounds, noise=10 * rounds.noise), labels)
    many = expected_errors(noisier, at, torch.Generator().manual_seed(0))
    torch.testing.assert_close(many, 10 * few, rtol=1e-4, atol=0)


def test_rounds_without_enough_equations_or_visible_rank_are_refused() -> None:
    features, labels = features_of(12), torch.arange(12) % CLASSES
    with pytest.raises(AttackError, match="at most 8 can"):
        StackedRounds.of(*federate(features, labels, 3), biased=True, num_images=12)
    with pytest.raises(AttackError, match=r"1 image cannot be told apart in 1 round of 2 classes .* at most 0 can"):
        StackedRounds.of(torch.zeros(1, 2, 9), torch.rand(1, 2, 9), biased=True)
    with pytest.raises(AttackError, match="show no rank"):
        weights, gradients = federate(features, labels, 12)
        noise = torch.randn(gradients.shape, generator=torch.Generator().manual_seed(0))
        StackedRounds.of(weights, gradients + noise, biased=True)
    with pytest.raises(AttackError, match="There may not be 3 images, as is assumed; or rounding"):
        StackedRounds.of(weights, gradients, biased=True, num_images=3)


def test_a_gap_before_images_that_noise_hides_is_not_taken_for_the_rank() -> None:
    generator = torch.Generator().manual_seed(1)
    own = torch.randn(9, WIDTH, generator=generator) + 2 * torch.randn(WIDTH, generator=generator)  # much in common
    weights, gradients = federate(
        12 * own / own.norm(dim=1, keepdim=True), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3]), 12
    )
    assert StackedRounds.of(weights, gradients, biased=True).num_images == 9
    noise = torch.randn(gradients.shape, generator=generator, dtype=torch.float64)
    with pytest.raises(AttackError, match="more than 4 images, which noise hides: singular value 5"):
        StackedRounds.of(weights, gradients + 0.01 * gradients.square().mean().sqrt() * noise, biased=True)


def test_a_head_without_bias_is_refused(nine: tuple) -> None:
    with pytest.raises(AttackError, match="no bias"):
        solve_rounds(replace(nine[2], biased=False))
