"""Images from updates of a patch embedding, with and without noise."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from attack_modules.analytic.patch_embedding import PatchEmbedding, PatchUpdate
from attack_modules.analytic.patch_reading import Control, PatchReading
from attack_modules.analytic.typical_head import pink_noise
from fl_lightning.models import WrappedClassifier

SHAPE, POSITIONS, WIDTH = (3, 32, 32), 16, 48
VIT = {"image_size": 32, "patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": WIDTH, "mlp_dim": 48}
MODEL = WrappedClassifier(10, SHAPE, VisionTransformer, {**VIT, "num_classes": 10}, mean=[0.4, 0.5, 0.6], std=[0.3])
EMBEDDING = PatchEmbedding.of(MODEL)


def update_of(images: Tensor, noise: float, seed: int = 0, told: float = 0.0) -> PatchUpdate:
    """Of images (N, C, H, W), with errors that are much alike, and noise that is told to that share."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    patches = EMBEDDING.patches(MODEL.normalise(images).double())
    errors = normal(len(images), 1, WIDTH) + 0.1 * normal(len(images), POSITIONS, WIDTH)
    products = torch.einsum("npd,npt->dt", errors, patches)
    total = errors.sum((0, 1)) + noise * normal(WIDTH)
    return PatchUpdate(
        products + noise * normal(*products.shape),
        errors.sum(0) + noise * normal(POSITIONS, WIDTH),
        total,
        (told * noise + 1e-9,) * 3,
    )


def read(*updates: PatchUpdate) -> tuple[Tensor, float, Control, PatchReading]:
    """The image, its noise, how good it is said to be, and the reading."""
    reading = PatchReading(EMBEDDING, updates, MODEL.mean.double(), MODEL.std.double(), SHAPE)
    known = reading.start()
    for _ in range(4):
        known = reading.step(known)
    return known.image, known.noise, reading.control(known), reading


def psnr(image: Tensor, truth: Tensor) -> float:
    return -10 * F.mse_loss(image.clamp(0, 1), truth.double()).log10().item()


def test_one_image_is_exact_and_its_quality_is_foretold_at_all_levels_of_noise() -> None:
    image = pink_noise(1, SHAPE)
    for noise, told, least in ((1e-5, 1.0, 80), (0.003, 1.0, 40), (0.003, 0.0, 40), (0.03, 1.0, 20)):
        found, estimated, control, reading = read(update_of(image, noise, told=told))
        assert psnr(found, image[0]) > least
        assert abs(control.psnr - psnr(found, image[0])) < 3
        assert 0.7 < control.spectrum < 1.5
        assert estimated == 0 if told else 0.8 < estimated / noise < 1.25
        assert reading.residual(found) < 2 * noise


def test_rounds_of_the_same_image_average_the_noise() -> None:
    image = pink_noise(1, SHAPE)
    single, several = (
        read(*(update_of(image, 0.01, seed, told=1.0) for seed in range(rounds)))[0] for rounds in (1, 4)
    )
    assert psnr(several, image[0]) > psnr(single, image[0]) + 3


def test_two_images_are_told_by_what_is_left() -> None:
    images = pink_noise(2, SHAPE)
    found, noise, control, reading = read(update_of(images, 0.0))
    assert max(psnr(found, image) for image in images) < 15
    assert control.spectrum > 4
    assert noise > 0
    assert reading.testable


def test_more_positions_than_equations_are_read_with_the_prior_and_not_tested() -> None:
    image = pink_noise(1, SHAPE)
    update = update_of(image, 1e-4, told=1.0)
    few = POSITIONS - 4
    part = PatchUpdate(update.products[:few], update.errors[:, :few], update.total[:few], update.rounding)
    found, noise, control, reading = read(part)
    assert not reading.testable
    assert noise == 0
    assert psnr(found, image[0]) > 18
    assert abs(control.psnr - psnr(found, image[0])) < 5
