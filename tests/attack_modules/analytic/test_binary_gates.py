"""Gates of one step, near the width of the layer, from weights that were rounded."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from attack_modules.analytic.binary_gates import ColumnSpace, GateSearch, binary_gates, gate_logit
from attack_modules.analytic.row_space import RowSpace

IMAGES, HIDDEN, WIDTH = 40, 56, 300


def layer() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features (N, D), weight (H, D), errors (N, H) and activations (N, H)."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(IMAGES, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(HIDDEN, WIDTH, generator=generator, dtype=torch.float64) / math.sqrt(WIDTH)
    errors = torch.randn(IMAGES, HIDDEN, generator=generator, dtype=torch.float64)
    return features, weight, errors, (features @ weight.T).relu()


def test_finds_gates_that_activations_leave_open() -> None:
    features, weight, errors, activations = layer()
    gates = (activations > 0).double()
    generator = torch.Generator().manual_seed(1)
    noisy = activations + 0.02 * torch.randn(activations.shape, generator=generator, dtype=torch.float64)
    gradient = (gates * errors).T @ features
    gradient += 1e-6 * torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
    space = RowSpace.of(gradient, weight)
    assert ((noisy > 0.02) != (gates > 0)).any(1).sum() > IMAGES / 2  # most images have a gate that the noise hides
    found, coordinates = binary_gates(space, 1.0, errors, noisy)
    torch.testing.assert_close(found, gates)
    assert ((space.vectors(coordinates) - features).norm(dim=1) / features.norm(dim=1)).max() < 1e-3


def test_more_images_than_units_rest_on_the_activations() -> None:
    features, weight, errors, activations = layer()
    few = HIDDEN // 2
    gates = (activations[:, :few] > 0).double()
    space = RowSpace.of((gates * errors[:, :few]).T @ features, weight[:few])
    found, _ = binary_gates(space, 1.0, errors[:, :few], activations[:, :few])
    torch.testing.assert_close(found, gates)


def test_two_wrong_gates_that_hide_each_other_are_flipped_together() -> None:
    inside = torch.tensor([[1.0], [-0.999], [0.0]], dtype=torch.float64)
    inside, errors = inside / inside.norm(), torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    shut = torch.zeros(3, dtype=torch.float64)
    likely, unlikely = torch.tensor([[2.0, 2, 8], [-1.0, -1, 8]], dtype=torch.float64)
    space, variance = ColumnSpace(inside, 1), torch.tensor([1e-4])
    assert GateSearch(space, errors, likely).flip(shut, variance)[0].tolist() == [1, 1, 1]
    assert GateSearch(space, errors, unlikely).flip(shut, variance)[0].tolist() == [0, 0, 1]


@pytest.mark.parametrize("inside", [5, 19])
def test_no_single_gate_or_pair_lowers_the_cost_any_more(inside: int) -> None:
    units, variance = 24, 0.3
    generator = torch.Generator().manual_seed(inside)
    vectors = torch.linalg.qr(torch.randn(units, units, generator=generator, dtype=torch.float64)).Q
    outside = vectors[:, inside:] @ vectors[:, inside:].T
    space = ColumnSpace(vectors, inside)
    assert space.basis.shape[1] == min(inside, units - inside)

    def cost(gates: Tensor) -> float:
        gated = gates * errors
        return (gated @ outside @ gated / (2 * variance) - gates @ logit).item()

    flipped = 0
    for _ in range(20):
        errors, logit = torch.randn(2, units, generator=generator, dtype=torch.float64)
        start = (logit > 0).double()
        found, least = GateSearch(space, errors, logit).flip(start, torch.tensor([variance], dtype=torch.float64))
        flipped += int((found != start).sum())
        assert least == pytest.approx(cost(found))
        for pair in itertools.combinations_with_replacement(range(units), 2):
            other = found.clone()
            other[list(set(pair))] = 1 - other[list(set(pair))]
            assert cost(other) > least - 1e-6
    assert flipped > 20


def test_witnesses_agree_with_integration() -> None:
    seen, noise, guessed, spread = (torch.full((1, 1), value, dtype=torch.float64) for value in (0.3, 0.4, -0.2, 0.7))
    grid = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    joint = (-(((grid.relu() - seen) / noise) ** 2) / 2 - ((grid - guessed) / spread) ** 2 / 2).exp()[0]
    expected = (joint[grid > 0].sum() / joint[grid <= 0].sum()).log()
    torch.testing.assert_close(gate_logit(seen, noise, guessed, spread)[0, 0], expected, atol=1e-3, rtol=0)
