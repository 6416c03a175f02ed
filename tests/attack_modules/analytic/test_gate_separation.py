"""Gate vectors found in the column space of an update, on random heads."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.gate_separation import separate

CLASSES, HIDDEN, WIDTH = 5, 100, 60


def make_aggregate(
    labels: Tensor, error_scatter: float = 0.0, classes: int = CLASSES, hidden: int = HIDDEN, contrast: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed gradient (H, D), first layer (H, D), class errors (C, H) and true gates (N, H).

    The lower the contrast (up to 1), the more the images are alike.
    """
    torch.manual_seed(0)
    features = torch.rand(WIDTH, dtype=torch.float64).lerp(
        torch.rand(len(labels), WIDTH, dtype=torch.float64), contrast
    )
    weight = torch.randn(hidden, WIDTH, dtype=torch.float64)
    last = torch.randn(classes, hidden, dtype=torch.float64)
    errors = last.mean(0) - last
    gates = (features @ weight.T > 0).double()
    scatter = error_scatter * torch.randn(len(labels), hidden, dtype=torch.float64)
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
    found = separate(rows, weight, errors, len(labels), told, exact=True)
    assert found.labels.sort().values.tolist() == [0, 1]


def test_noise_holds_no_images() -> None:
    _, weight, errors, _ = make_aggregate(torch.tensor([0]))
    noise = torch.randn(HIDDEN, 4, dtype=torch.float64) @ torch.randn(4, WIDTH, dtype=torch.float64)
    assert len(separate(noise, weight, errors, 4, torch.ones(CLASSES), exact=False).labels) == 0


@pytest.mark.parametrize("contrast", [0.2, 0.6])
def test_two_classes_of_look_alikes(contrast: float) -> None:
    """Their errors are opposite, so a gate vector fits both; half of these images differ from another in few units."""
    labels = torch.tensor([0] * 9 + [1] * 15)
    rows, weight, errors, gates = make_aggregate(labels, classes=2, hidden=400, contrast=contrast)
    found = separate(rows, weight, errors, len(labels), torch.tensor([16, 8]), exact=False)
    wrong = torch.cdist(found.gates, gates, p=1)
    assert sorted(wrong.argmin(1).tolist()) == list(range(len(labels)))
    assert wrong.amin(1).max() == 0
    assert found.labels.tolist() == labels[wrong.argmin(1)].tolist()


def test_images_among_a_thousand_classes() -> None:
    labels = torch.tensor([3, 3, 3, 500, 500, 999, 0, 0])
    rows, weight, errors, gates = make_aggregate(labels, classes=1000, hidden=200)
    quota = torch.rand(1000) + labels.bincount(minlength=1000)  # hints at more classes than there are
    found = separate(rows, weight, errors, len(labels), quota, exact=False)
    assert found.labels.sort().values.tolist() == labels.sort().values.tolist()
    assert torch.cdist(found.gates, gates, p=1).amin(1).max() < 0.05 * 200


def test_no_image_is_found_twice() -> None:
    """Too high a number of images leaves directions of noise in the space."""
    labels = torch.tensor([0] * 6 + [1] * 6)
    rows, weight, errors, gates = make_aggregate(labels, classes=2, hidden=300, contrast=0.4)
    noisy = rows + 1e-6 * torch.randn_like(rows)
    found = separate(noisy, weight, errors, len(labels) + 4, torch.tensor([8, 8]), exact=False)
    wrong = torch.cdist(found.gates, gates, p=1)
    assert wrong.argmin(1).unique().tolist() == list(range(len(labels)))
    assert len(found.labels) == len(labels)


def test_as_many_images_as_units_are_not_certified() -> None:
    labels = torch.arange(4).repeat(3)
    rows, weight, errors, _ = make_aggregate(labels, hidden=12)
    assert len(separate(rows, weight, errors, len(labels), torch.ones(CLASSES), exact=False).labels) == 0
