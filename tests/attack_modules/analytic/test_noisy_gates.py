"""Gates and features of a noisy update, on heads whose features, gates and noise are known."""

import pytest
import torch
from torch import Tensor, nn

from attack_modules.analytic.defended_head import Expected, HeadRound
from attack_modules.analytic.noisy_gates import NoisyGates, activation_noise, noisy_gates, unexplained
from fl_lightning.defenses import Clipping, GaussianNoise, Quantization, TopK

IMAGES, HIDDEN, WIDTH, CLASSES = 6, 128, 900, 60


def make_round(noise: float, seed: int, coarse: int | None = None) -> tuple[HeadRound, Tensor, Tensor]:
    """One step of a random head under noise of so much of the rms, or QSGD of so many levels; features and gates."""
    random = torch.Generator().manual_seed(seed)
    features = torch.rand(IMAGES, WIDTH, generator=torch.Generator().manual_seed(9)) ** 2
    weight = torch.randn(HIDDEN, WIDTH, generator=random) / WIDTH**0.5
    last = torch.randn(CLASSES, HIDDEN, generator=random) / HIDDEN**0.5
    hidden = (features @ weight.T).relu()
    errors = ((hidden @ last.T).softmax(1) - nn.functional.one_hot(torch.arange(IMAGES), CLASSES)) @ last
    gates = (hidden > 0).float()
    update, shown = (gates * errors).T @ features, hidden.clone()
    if coarse:
        step = update.norm(dim=1, keepdim=True).clamp_min(1e-9) / WIDTH**0.5 * 4 / coarse
        update = (update / step + torch.rand(update.shape, generator=random)).floor() * step
        step = hidden.max() / coarse
        shown = (shown / step + torch.rand(shown.shape, generator=random)).floor() * step
    else:
        update = update + noise * update.square().mean().sqrt() * torch.randn(update.shape, generator=random)
        shown = shown + 0.3 * noise * hidden.square().mean().sqrt() * torch.randn(shown.shape, generator=random)
    return HeadRound(update, weight, shown, errors), features, gates


def error(found: Tensor, features: Tensor) -> Tensor:
    return (found - features).norm(dim=1) / features.norm(dim=1)


@pytest.mark.parametrize(("noise", "coarse"), [(0.5, None), (1.5, None), (0.0, 2)])
def test_features_are_as_good_as_under_the_true_gates_and_their_error_is_foretold(
    noise: float, coarse: int | None
) -> None:
    seen, features, gates = make_round(noise, seed=0, coarse=coarse)
    found = noisy_gates([seen])
    best = error(torch.linalg.lstsq((gates * seen.errors).T, seen.update).solution, features)
    assert ((found.gates > 0.5) == (gates > 0)).double().mean() > 0.97
    off = error(found.features, features)
    assert off.mean() < 1.1 * best.mean()
    torch.testing.assert_close(found.uncertainty.mean(), off.mean().double(), rtol=0.15, atol=0)


def test_without_noise_features_are_exact() -> None:
    seen, features, _ = make_round(0.0, seed=0)
    assert error(noisy_gates([seen]).features, features).max() < 1e-3


def test_noise_of_several_rounds_averages_out() -> None:
    rounds, features = [make_round(2.0, seed)[0] for seed in range(4)], make_round(0.0, 0)[1]
    one, four = (error(noisy_gates(part).features, features).mean() for part in (rounds[:1], rounds))
    assert four < 0.6 * one


def test_update_that_is_all_noise_gives_no_features() -> None:
    seen, *_ = make_round(0.0, seed=0)
    noise = torch.randn(seen.update.shape, generator=torch.Generator().manual_seed(1))
    blind = HeadRound(noise, seen.weight, seen.activations, seen.errors)
    found = NoisyGates().solve([blind], Expected(torch.zeros(IMAGES, WIDTH), torch.ones(IMAGES)))
    assert found.uncertainty.median() > 0.9


def test_sizes_of_noise() -> None:
    random = torch.Generator().manual_seed(0)
    activations = 0.1 * torch.randn(3, 4000, generator=random).double()
    activations[:, ::2] += 1.0
    torch.testing.assert_close(activation_noise(activations), torch.full((3, 1), 0.1).double(), rtol=0.05, atol=0)
    low_rank = torch.randn(64, 3, generator=random) @ torch.randn(3, 2000, generator=random)
    noisy = (low_rank + 0.2 * torch.randn(64, 2000, generator=random)).double()
    torch.testing.assert_close(unexplained(noisy, 3).mean().sqrt(), torch.tensor(0.2).double(), rtol=0.05, atol=0)


def test_which_defences_ask_for_it() -> None:
    for defense in (GaussianNoise(rho=1.0), Quantization(bits=4)):
        assert NoisyGates.against([Clipping(1.0), defense])
    for defenses in ([], [TopK(0.1)], [Quantization(bits=8)], [Clipping(1.0)]):
        assert NoisyGates.against(defenses) is None
