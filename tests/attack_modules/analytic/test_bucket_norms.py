"""Sums of what several peers rounded in units of their buckets' norms; sizes, gates and features are known."""

import pytest
import torch
from torch import Tensor, nn

from attack_modules.analytic.bucket_norms import (
    BucketNorms,
    SentLevels,
    gates_of_norms,
    likeliest,
    peers_of_levels,
    sent_levels,
    shortest,
)
from attack_modules.analytic.defended_head import Expected, HeadRound, LastLayer, UnreadableDefense
from attack_modules.analytic.noisy_gates import NoisyGates
from fl_lightning.defenses import QSGD, GaussianNoise
from fl_lightning.defenses.defense import Occasion

IMAGES, HIDDEN, WIDTH, CLASSES, BUCKET, LEVELS = 6, 192, 1024, 60, 128, 3
PEERS = torch.tensor([0, 1, 2, 0, 1, 2])


def rounded(bias: bool = False) -> tuple[HeadRound, Tensor, Tensor]:
    """One step of a random head of which three peers round the update; the features, and the gated errors."""
    random = torch.Generator().manual_seed(0)
    features = torch.rand(IMAGES, WIDTH, generator=random) ** 2 * (0.5 + torch.rand(WIDTH, generator=random))
    features = torch.cat([features, torch.ones(IMAGES, int(bias))], 1)
    weight = torch.randn(HIDDEN, WIDTH + bias, generator=random) / WIDTH**0.5
    last = 0.5 * torch.randn(CLASSES, HIDDEN, generator=random) / HIDDEN**0.5
    hidden = (features @ weight.T).relu()
    wrong = (hidden @ last.T).softmax(1) - nn.functional.one_hot(torch.arange(IMAGES), CLASSES)
    errors, gates = wrong @ last, hidden > 0
    first, shown, dice = weight.clone(), torch.zeros_like(hidden), Occasion({}, random, {})
    for peer in (0, 1, 2):
        own, defense = peer == PEERS, QSGD(LEVELS, BUCKET)
        update = (gates * errors)[own].T @ features[own]
        for part in (slice(0, WIDTH), slice(WIDTH, None)):
            first[:, part] -= 1e-2 * defense.on_update({"w": update[:, part]}, dice)["w"]  # in float32, as models are
        shown[own] = torch.stack([QSGD(LEVELS, HIDDEN).on_update({"w": one}, dice)["w"] for one in hidden[own]])
    nothing = torch.zeros(CLASSES)
    layer = LastLayer(nothing[:, None], nothing[:, None], torch.arange(IMAGES), nothing[None], nothing, 100.0)
    return HeadRound((weight - first) * 100, weight, shown, errors, layer), features, gates * errors


@pytest.mark.parametrize("bias", [False, True])
def test_what_noise_hides_norms_show(bias: bool) -> None:
    seen, features, gated = rounded(bias)
    expected = Expected(torch.zeros_like(features), torch.ones(IMAGES))
    found, noisy = BucketNorms(LEVELS, BUCKET).solve([seen], expected), NoisyGates().solve([seen], expected)
    assert torch.equal(found.peers[:, None] == found.peers, PEERS[:, None] == PEERS)
    assert ((found.gated != 0) == (gated != 0)).double().mean() > 0.97

    def error(other: Tensor) -> Tensor:
        return (other - features).norm(dim=1) / features.norm(dim=1)

    off = error(found.features)
    assert off.mean() < 0.85 * error(noisy.features).mean()
    torch.testing.assert_close(found.uncertainty.mean(), off.mean().double(), rtol=0.25, atol=0)


@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_the_error_counts_what_is_beyond_the_rounding(drift: float) -> None:
    """Several local steps leave more than one does, by so many sizes of a level here."""
    random = torch.Generator().manual_seed(0)
    gated, features = torch.randn(4, 256, generator=random), torch.rand(4, 200, generator=random)
    entries = gated.T @ features
    sizes = torch.full_like(entries, 0.5)
    sent = ((entries / sizes + torch.rand(entries.shape, generator=random)).floor()) * sizes
    sent += drift * sizes * torch.randn(entries.shape, generator=random)
    found, variance = likeliest(sent, sizes, torch.ones_like(sent, dtype=torch.bool), gated)
    torch.testing.assert_close(variance.sum().sqrt(), (found - features).norm(), rtol=0.3, atol=0)


def test_multiples_of_sizes_are_found_again() -> None:
    random = torch.Generator().manual_seed(0)
    sizes = 0.1 + torch.rand(20, 3, generator=random)
    counts = torch.tensor([-2, -1, 0, 1, 2])
    counts = counts[torch.tensor([0.01, 0.1, 0.78, 0.1, 0.01]).multinomial(20 * 256 * 3, True, generator=random)]
    counts = counts.view(20, 256, 3)
    values = (counts * sizes[:, None]).sum(2)
    found = sent_levels(values + 1e-6 * torch.randn(values.shape, generator=random), torch.full_like(values, 1e-6), 4)
    torch.testing.assert_close(found.sizes.sort(1).values, sizes.sort(1).values, rtol=1e-4, atol=0)
    assert found.explained.double().mean() > 0.99
    with pytest.raises(UnreadableDefense, match="no sums of multiples"):
        sent_levels(torch.randn(20, 256, generator=random), torch.full_like(values, 1e-6), 4)


def test_a_peer_too_many_that_sends_little_is_not_overlooked() -> None:
    """Its images open few units, so that most of its buckets are empty."""
    random = torch.Generator().manual_seed(0)
    updates = torch.randn(6, 40, 256, generator=random) * torch.rand(6, 40, 256, generator=random) ** 2
    updates[5, 10:] = 0
    sent = [QSGD(1, 256).on_update({"w": one}, Occasion({}, random, {}))["w"] for one in updates]
    noise = torch.full_like(updates[0], 1e-6)
    assert sent_levels(sum(sent[:5]), noise, 1).sizes.shape[1] == 5
    with pytest.raises(UnreadableDefense, match="up to 5 sizes"):
        sent_levels(sum(sent), noise, 1)


def test_multiples_are_made_small() -> None:
    counts = torch.tensor([[[1, 0], [0, 1], [0, 1], [1, 1], [1, 0]]], dtype=torch.int8)
    of_sum = counts @ torch.tensor([[0, 1], [1, -1]], dtype=torch.int8)  # of sizes (s_1 + s_2, s_1)
    sizes, found = shortest(torch.tensor([[5.0, 3.0]]), of_sum)
    assert sorted(sizes[0].tolist()) == [2.0, 3.0]
    torch.testing.assert_close((found * sizes[:, None]).sum(2), (counts * torch.tensor([3.0, 2.0])).sum(2))
    assert found.abs().sum() == counts.abs().sum()


def test_norms_show_gates_in_spite_of_other_peers_buckets() -> None:
    random = torch.Generator().manual_seed(0)
    features, errors = torch.rand(3, 8, 64, generator=random), torch.randn(3, 200, generator=random)
    gates = torch.rand(3, 200, generator=random) < 0.5
    norms = torch.einsum("nk,nbe->kbe", gates * errors, features).norm(dim=2)
    norms[torch.rand(norms.shape, generator=random) < 0.1] *= 2
    start = gates ^ (torch.rand(gates.shape, generator=random) < 0.1)
    assert (gates_of_norms(norms, errors, start)[0] == gates).double().mean() > 0.995


def test_a_single_image_or_peer_is_its_own_and_nothing_shown_is_refused() -> None:
    def sent(peers: int) -> SentLevels:
        return SentLevels(torch.ones(5, peers), torch.zeros(5, 8, peers, dtype=torch.int8), torch.ones(5, 8).bool())

    assert peers_of_levels(sent(2), torch.rand(1, 8), torch.ones(1, 5)).tolist() == [0]
    assert peers_of_levels(sent(1), torch.rand(3, 8), torch.ones(3, 5)).tolist() == [0, 0, 0]
    with pytest.raises(UnreadableDefense, match="whose levels are whose"):
        peers_of_levels(sent(2), torch.rand(3, 8), torch.ones(3, 5))


def test_who_reads_what() -> None:
    assert BucketNorms.against([GaussianNoise(rho=1.0)]) is None
    assert BucketNorms.against([QSGD(levels=4, bucket=64)]).bucket == 64


def test_rows_that_are_no_whole_buckets_are_read_as_noise() -> None:
    seen, features, _ = rounded()
    expected = Expected(torch.zeros_like(features), torch.ones(IMAGES))
    with pytest.warns(UserWarning, match="buckets of 100 entries"):
        found = BucketNorms(LEVELS, 100).solve([seen], expected)
    torch.testing.assert_close(found.features, NoisyGates().solve([seen], expected).features)


def test_equations_that_cannot_be_solved_lead_to_the_reading_as_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def singular(*_: object) -> None:
        raise torch.linalg.LinAlgError("The diagonal element 3 is zero.")

    seen, features, _ = rounded()
    expected = Expected(torch.zeros_like(features), torch.ones(IMAGES))
    monkeypatch.setattr("attack_modules.analytic.bucket_norms.solve_levels", singular)
    with pytest.warns(UserWarning, match="cannot be solved. It is read as noise"):
        found = BucketNorms(LEVELS, BUCKET).solve([seen], expected)
    torch.testing.assert_close(found.features, NoisyGates().solve([seen], expected).features)
