"""Gate vectors found in the column space of an update, on random heads."""

import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.gate_separation import separate

CLASSES, HIDDEN, WIDTH = 5, 100, 60


def make_aggregate(labels: Tensor, error_scatter: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed gradient (H, D), first layer (H, D), class errors (C, H) and true gates (N, H)."""
    torch.manual_seed(0)
    features = torch.rand(len(labels), WIDTH, dtype=torch.float64)
    weight = torch.randn(HIDDEN, WIDTH, dtype=torch.float64)
    last = torch.randn(CLASSES, HIDDEN, dtype=torch.float64)
    errors = last.mean(0) - last
    gates = (features @ weight.T > 0).double()
    scatter = error_scatter * torch.randn(len(labels), HIDDEN, dtype=torch.float64)
    return (gates * (errors[labels] + scatter)).T @ features, weight, errors, gates


def test_finds_every_image_and_its_class() -> None:
    labels = torch.tensor([0, 0, 0, 1, 3, 3])
    rows, weight, errors, gates = make_aggregate(labels)
    found = separate(rows, weight, errors, len(labels), torch.ones(CLASSES), exact=False)
    mismatch = torch.cdist(found.gates * errors[found.labels], gates * errors[labels]) / errors[labels].norm(dim=1)
    nearest = mismatch.argmin(1)
    assert sorted(nearest.tolist()) == list(range(len(labels)))
    assert found.labels.tolist() == labels[nearest].tolist()
    assert mismatch.amin(1).max() < 0.02  # units of which the class's error is next to nothing do not tell
    assert found.outside.max() < 0.02


def test_scatter_of_errors_shows_as_outside() -> None:
    labels = torch.tensor([0, 0, 1, 3, 3])
    rows, weight, errors, gates = make_aggregate(labels, error_scatter=0.02)
    found = separate(rows, weight, errors, len(labels), torch.ones(CLASSES), exact=False)
    assert found.labels.sort().values.tolist() == labels.tolist()
    assert 1e-3 < found.outside.max() < 0.1
    assert torch.cdist(found.gates, gates, p=1).amin(1).max() < 0.1 * HIDDEN


def test_exact_counts_restrict_the_search() -> None:
    labels = torch.tensor([0, 0, 1, 3])
    rows, weight, errors, _ = make_aggregate(labels)
    told = F.one_hot(torch.tensor([0, 1]), CLASSES).sum(0)  # two of the four images are of other classes, it is told
    found = separate(rows, weight, errors, len(labels), told, exact=True, patience=10)
    assert found.labels.sort().values.tolist() == [0, 1]


def test_noise_holds_no_images() -> None:
    _, weight, errors, _ = make_aggregate(torch.tensor([0]))
    noise = torch.randn(HIDDEN, 4, dtype=torch.float64) @ torch.randn(4, WIDTH, dtype=torch.float64)
    assert len(separate(noise, weight, errors, 4, torch.ones(CLASSES), exact=False, patience=20).labels) == 0
