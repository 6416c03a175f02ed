"""An image counts as leaked if its reconstruction is nearer to it than to any stranger."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from attack_modules.analytic.typical_head import pink_noise
from attack_modules.evaluation.strangers import Strangers
from attack_modules.panels import save_png
from fl_lightning.errors import SettingError

SHAPE = (3, 16, 16)


@pytest.fixture
def originals() -> Tensor:
    return pink_noise(8, SHAPE, seed=1)


@pytest.fixture
def strangers() -> Strangers:
    return Strangers((255 * pink_noise(99, SHAPE, seed=2)).byte(), ["public"] * 99, "pink noise")


def test_noisy_and_dim_reconstructions_are_told_from_strangers(originals: Tensor, strangers: Strangers) -> None:
    noise = 0.1 * torch.randn(originals.shape, generator=torch.Generator().manual_seed(0))
    assert strangers.compare(0.2 * (originals + noise) + 0.4, originals).nearer.tolist() == [0] * 8


def test_pictures_of_nothing_are_told_by_chance_alone(originals: Tensor, strangers: Strangers) -> None:
    nothing = torch.rand(400, *SHAPE, generator=torch.Generator().manual_seed(0))
    ranks = strangers.compare(nothing, originals.repeat(50, 1, 1, 1)).nearer
    assert (ranks == 0).double().mean() < 0.03  # once in 100 times
    assert 40 < ranks.double().mean() < 60  # anywhere among the 99 strangers
    assert strangers.compare(torch.full_like(originals, 0.5), originals).nearer.tolist() == [99] * 8
    assert (strangers.compare(originals.roll(1, 0), originals).nearer > 0).sum() >= 6  # another's original


def test_the_original_itself_is_no_stranger(originals: Tensor) -> None:
    among = Strangers((255 * originals).byte(), [f"{i}.png" for i in range(8)], "the originals")
    assert among.compare(originals, originals).nearer.tolist() == [0] * 8
    mixed = originals + 2 * originals.roll(1, 0)  # shows another's more than its own
    assert among.compare(mixed, originals).nearer.tolist() == [1] * 8
    names = [f"{(i - 1) % 8}.png" for i in range(8)]  # that other comes from where the original does
    assert among.compare(mixed, originals, names).nearer.tolist() == [0] * 8


def test_chance_is_measured_on_the_reconstructions_of_others(originals: Tensor, strangers: Strangers) -> None:
    assert 8 / (8 + 99) <= strangers.compare(originals, originals).chance < 0.2
    assert strangers.compare(originals[:1], originals[:1]).chance == 1 / 100
    alike = originals[:1] + 0.01 * originals  # pictures alike, and strangers of another kind
    found = strangers.compare(alike + 0.01 * torch.rand(alike.shape), alike)
    assert found.nearer.tolist() == [0] * 8
    assert found.chance == 1  # so nothing was shown


def test_originals_are_confirmed_by_their_reconstructions_alone(originals: Tensor, strangers: Strangers) -> None:
    noise = 0.1 * torch.randn(originals.shape, generator=torch.Generator().manual_seed(0))
    found = strangers.confirm(originals + noise, originals)
    assert (found.rate, found.area) == (1, 1)
    assert found.by_others < 0.5
    half = (originals + noise).index_fill(0, torch.arange(4), torch.nan)  # of four there is no reconstruction
    assert 0.5 <= strangers.confirm(half, originals).rate < 1
    alike = originals[:1] + 0.01 * originals  # each is confirmed by any other
    assert strangers.confirm(alike, alike).by_others == 1
    nothing = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(1))
    assert strangers.confirm(nothing, originals).area < 0.75
    assert strangers.confirm(torch.full_like(originals, torch.nan), originals) is None
    assert strangers.confirm(originals, originals, ["public"] * 8) is None  # no stranger is left


def test_photographs_and_folders_are_public_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attack_modules.evaluation.strangers.CROPS", 2)
    crops = Strangers.photographs((3, 12, 12))
    assert len(crops) == 32
    assert len(set(crops.sources)) == 16
    grey = Strangers.photographs((1, 12, 12))
    assert grey.pixels.shape == (32, 144)
    for i, image in enumerate(pink_noise(3, SHAPE, seed=3)):
        (tmp_path / "a").mkdir(exist_ok=True)
        save_png(image, tmp_path / "a" / f"{i}.png")
    assert len(Strangers.folder(tmp_path, (3, 12, 12))) == 3
    with pytest.raises(SettingError, match="cannot be compared"):
        grey.compare(torch.zeros(1, *SHAPE), torch.zeros(1, *SHAPE))
