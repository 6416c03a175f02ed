"""Peers and sizes of features from the errors that images show, on random heads."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.drifting_peers import coupling_of
from attack_modules.analytic.head_training import simulate
from attack_modules.analytic.peers_by_errors import SIZE_RANGE, ShownErrors, TrainedTogether, trained_together

PEERS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
HIDDEN, RATE = 300, 0.01
LABELS = torch.tensor([0, 1, 0, 0, 0, 1, 1, 0, 1])


def shown_errors(noise: float = 0.0) -> tuple[ShownErrors, Tensor]:
    """Of images that are alike, in three peers of different sizes, and the sizes of their features."""
    generator = torch.Generator().manual_seed(0)
    common, own = (torch.randn(n, 80, generator=generator, dtype=torch.float64) for n in (1, len(LABELS)))
    features = (common + 0.4 * own).clamp_min(0)
    first = torch.randn(HIDDEN, 80, generator=generator, dtype=torch.float64) / 80**0.5
    last = torch.randn(2, HIDDEN, generator=generator, dtype=torch.float64) / HIDDEN**0.5
    targets = F.one_hot(LABELS, 2).double()
    start, gram = features @ first.T, features @ features.T
    path = simulate(gram, start, [last], targets, coupling_of(PEERS), RATE, 3)[0]
    size = features.norm(dim=1)
    shown = (path.errors * (path.preactivations > 0)).mean(0) * size[:, None]
    shown += noise * shown.square().mean().sqrt() * torch.randn(shown.shape, generator=generator, dtype=torch.float64)
    return ShownErrors(shown, gram / size[:, None] / size, start / size[:, None], last, targets, RATE, 3), size


def test_peers_and_sizes_are_found_from_wrong_sizes() -> None:
    images, size = shown_errors()
    found = trained_together(images, torch.full_like(size, 0.9 * size.mean()))
    assert torch.equal(found.peers, PEERS)
    assert (found.sizes / size - 1).abs().max() < 1e-2
    assert found.uncertainty.max() < 0.01


def test_noise_shows_as_uncertainty() -> None:
    images, size = shown_errors(noise=0.1)
    found = trained_together(images, size)
    assert torch.equal(found.peers, PEERS)
    assert 0.02 < found.uncertainty.min() < found.uncertainty.max() < 0.2
    assert (found.sizes / size - 1).abs().max() < found.uncertainty.max()


def test_sizes_stay_near_their_first_estimate() -> None:
    images, size = shown_errors()
    shown = images.shown.clone()
    shown[4] *= 5
    found = trained_together(replace(images, shown=shown), size)
    assert found.sizes[4] / size[4] <= SIZE_RANGE


def test_no_image_is_more_certain_than_half_of_what_the_median_one_leaves() -> None:
    left = torch.tensor([0.1, 0.2, 0.4])
    torch.testing.assert_close(TrainedTogether(left.long(), left, left).uncertainty, torch.tensor([0.1, 0.1, 0.2]))
