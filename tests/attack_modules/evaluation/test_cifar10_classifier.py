"""The classifier of CIFAR-10 that is shipped."""

from pathlib import Path

import pytest
import torch

from attack_modules.evaluation.cifar10_classifier import SHIPPED, Cifar10Classifier, Cifar10Recogniser
from attack_modules.weights import read_weights
from fl_lightning.data import CIFAR10
from fl_lightning.errors import MissingFile, SettingError
from fl_lightning.storage import StorageError

ARCHIVE = Path(__file__).parents[4] / "shared/data/cifar10-jpg.tar.gz"


@pytest.mark.slow
@pytest.mark.skipif(not ARCHIVE.exists(), reason=f"needs CIFAR-10 at {ARCHIVE}")
def test_it_recognises_test_images() -> None:
    catalogue = CIFAR10(ARCHIVE, num_clients=1).test_catalogue()
    images = catalogue.read_all(torch.arange(0, 10_000, 10), (3, 32, 32))
    top1, top5 = Cifar10Recogniser()(images.images, images.labels)
    assert 0.74 < top1.float().mean() < 0.82
    assert top5.float().mean() > 0.95


def test_images_of_any_size_and_mode_are_scored() -> None:
    recogniser = Cifar10Recogniser()
    image = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    likeliest = recogniser.logits(image).argmax(1)
    top1, top5 = recogniser(image, likeliest)
    assert top1.all() and top5.all()
    assert recogniser.logits(torch.rand(2, 1, 48, 48)).shape == (2, 10)
    assert recogniser.logits(image[:0]).shape == (0, 10)


def test_missing_and_foreign_weights(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"no weights at .*python cli.py fit --config configs/cifar10_classifier"):
        Cifar10Recogniser(tmp_path / "gone.safetensors")
    weights = read_weights(SHIPPED, "here")
    del weights["11.bias"]
    torch.save(weights, tmp_path / "cut.pt")
    with pytest.raises(StorageError, match=r"11.bias is missing"):
        Cifar10Recogniser(tmp_path / "cut.pt")


def test_variation_reflects_and_shifts() -> None:
    module = Cifar10Classifier()
    images = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    varied = module._varied(images)
    assert varied.shape == images.shape
    windows = [images[0, :, d : d + 16, a : a + 16] for d in range(5, 12) for a in range(5, 12)]
    inner = varied[0, :, 8:24, 8:24]
    assert sum(torch.equal(inner, window) or torch.equal(inner, window.flip(2)) for window in windows) == 1
    with pytest.raises(SettingError, match="lr > 0"):
        Cifar10Classifier(lr=0)
