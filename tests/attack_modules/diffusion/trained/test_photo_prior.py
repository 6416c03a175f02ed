import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from attack_modules.analytic.typical_head import pink_noise
from attack_modules.diffusion.trained.denoising_comparison import add_noise, psnr, sample
from attack_modules.diffusion.trained.photo_crops import Crops, PhotoCrops, read_photograph
from attack_modules.diffusion.trained.photo_prior import DiffusionPrior, TrainedPrior
from attack_modules.panels import save_png
from cli import main
from fl_lightning.errors import MissingFile, SettingError
from fl_lightning.storage import StorageError

ROOT = Path(__file__).parents[4]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Six classes of one photograph each, of which the last two are held out."""
    for index, image in enumerate(pink_noise(6, (3, 40, 40), seed=3)):
        save_png(image, tmp_path / "photos" / f"n{index}" / "photo.png")
    (tmp_path / "validation.txt").write_text("# held out\nn4\n")
    (tmp_path / "evaluation.txt").write_text("n5\n")
    return tmp_path


def fit(folders: Path, name: str, epochs: int, *more: str, verb: str = "fit") -> DiffusionPrior:
    model = [
        f"--config={ROOT / 'configs/prior_photos.yaml'}",
        "--trainer.precision=32-true",  # the file's bf16 is refused where the processor does not compute in it
        f"--data.roots=[{folders / 'photos'}]",
        f"--data.validation={folders / 'validation.txt'}",
        f"--data.left_out=[{folders / 'evaluation.txt'}]",
        "--data.crop_size=16",
        "--data.image_size=16",
        "--data.batch_size=4",
        "--data.steps_per_epoch=3",
        "--model.channels=[8]",
        "--model.layers=1",
        "--model.warmup=2",
        "--model.cooldown=0",
        f"--trainer.max_epochs={epochs}",
        "--trainer.check_val_every_n_epoch=2",
        "--trainer.log_every_n_steps=1",
        f"--trainer.logger.save_dir={folders / 'runs'}",
        f"--trainer.logger.name={name}",
        "--trainer.accelerator=cpu",
    ]
    return main([verb, *model, *more]).model


def test_training_by_the_command_line_resumes_to_the_same_weights(folders: Path) -> None:
    whole = fit(folders, "whole", 2)
    fit(folders, "halves", 1)  # without a validation
    resumed = fit(folders, "halves", 2, f"--ckpt_path={folders}/runs/halves/version_0/checkpoints/last.ckpt")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert int(whole.average.n_averaged) == 6

    exported = TrainedPrior.load(folders / "runs/whole/version_0/prior.safetensors")
    for name, tensor in whole.prior.state_dict().items():
        assert torch.equal(tensor.half().float(), exported.state_dict()[name])
    assert not torch.equal(whole.prior.unet.conv_in.weight, whole.network.unet.conv_in.weight)


def test_validation_measures_the_prior_beside_total_variation(folders: Path) -> None:
    fit(folders, "tried", 1)
    last = folders / "runs/tried/version_0/checkpoints/last.ckpt"
    metrics = fit(folders, "tested", 1, f"--ckpt_path={last}", verb="test").trainer.callback_metrics
    assert {"psnr/0.1", "psnr_tv/0.1", "psnr/0.4", "psnr_tv/0.4"} <= set(metrics)
    assert metrics["psnr_tv/0.1"] > 20.5  # the noise alone is at 20 dB


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    module = DiffusionPrior(channels=[8], layers=1)
    images = pink_noise(16, (3, 16, 16), seed=0)
    sigma = torch.full((16,), 0.2)
    noisy = add_noise(images, 0.2, seed=0)
    optimizer = torch.optim.Adam(module.network.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = (
            module.network.loss_weight(sigma) * (module.network(noisy, sigma) - images).square().mean((1, 2, 3))
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


def test_the_average_is_the_geometric_one() -> None:
    module = DiffusionPrior(channels=[8], layers=1, decay=0.15)
    with torch.no_grad():
        weight, expected = module.network.unet.conv_in.bias, torch.zeros(8)
        for step in range(4):
            weight.fill_(step)
            module.on_train_batch_end(None, torch.empty(0), step)
            decay = min(0.15, (1 + step) / (10 + step))  # the first update copies
            expected = decay * expected + (1 - decay) * step if step else torch.full((8,), float(step))
    torch.testing.assert_close(module.prior.unet.conv_in.bias, expected)


def test_untrained_it_is_the_best_pixelwise_denoiser_and_without_noise_the_identity() -> None:
    prior, noisy = TrainedPrior([8, 8], layers=1), torch.rand(2, 3, 16, 24)
    wiener = 0.5 + prior.sigma_data**2 / (prior.sigma_data**2 + 0.3**2) * (noisy - 0.5)
    torch.testing.assert_close(prior(noisy, torch.tensor(0.3)), wiener)
    torch.nn.init.normal_(prior.unet.conv_out.weight)
    torch.testing.assert_close(prior(noisy, torch.zeros(2)), noisy)
    assert psnr(prior(noisy, torch.tensor(0.3)), wiener).max() < 60
    # the squared error that the weight makes one
    assert prior.loss_weight(torch.tensor(0.3)) == pytest.approx(1 / 0.3**2 + 1 / prior.sigma_data**2)


def test_noise_levels_are_where_restoration_needs_them() -> None:
    module = DiffusionPrior(channels=[8], layers=1)
    sigma = module.noise_levels(10_000, torch.Generator().manual_seed(0))
    assert sigma.min() >= module.prior.sigma_min
    assert sigma.max() > 9
    assert ((sigma > 0.02) & (sigma < 0.5)).float().mean() > 0.75
    assert (module.noise_levels(16, torch.Generator().manual_seed(0)) > 0.3).any()


def test_crops_are_the_same_again_and_reduce_the_photograph(folders: Path) -> None:
    photograph = read_photograph(folders / "photos/n0/photo.png")
    crops = Crops([photograph], size=20, reduction=2.0, seed=0)
    assert torch.equal(crops[5], crops[5])
    assert not torch.equal(crops[5], crops[6])
    assert crops[5].shape == (3, 20, 20)
    whole = Crops([photograph], size=40, reduction=2.0, seed=0)  # no place to choose and none to shrink
    assert any(torch.equal((whole[n] * 255).byte(), (whole[0] * 255).byte().flip(2)) for n in range(1, 20))


def test_held_out_images_are_not_trained_on(folders: Path) -> None:
    data = PhotoCrops([folders / "photos"], folders / "validation.txt", [folders / "evaluation.txt"], 16, image_size=16)
    data.setup("fit")
    assert (len(data.crops.photographs), len(data.held_out)) == (4, 1)


@pytest.mark.parametrize("original", ["n4", "n5"])
def test_a_copy_of_an_image_that_the_lists_exclude_is_not_trained_on(folders: Path, original: str) -> None:
    photos = folders / "photos"
    copy = photos / "n0/again.png"
    copy.write_bytes((photos / original / "photo.png").read_bytes())
    data = PhotoCrops([photos], folders / "validation.txt", [folders / "evaluation.txt"], 16, image_size=16)
    with pytest.warns(UserWarning, match=r"1 of 5 training images are copies .* for example '.*again.png'"):
        data.setup("fit")
    assert (len(data.crops.photographs), len(data.held_out)) == (4, 1)


def test_samples_are_images() -> None:
    samples = sample(TrainedPrior([8], layers=1), (2, 3, 8, 8), torch.device("cpu"), steps=3)
    assert samples.shape == (2, 3, 8, 8)
    assert samples.isfinite().all()


def test_what_cannot_be_is_refused(folders: Path, tmp_path: Path) -> None:
    prior = TrainedPrior([8, 8], layers=1)
    with pytest.raises(SettingError, match="multiples of 4, but got \\(1, 3, 16, 18\\)"):
        prior(torch.rand(1, 3, 16, 18), torch.tensor(0.1))
    with pytest.raises(SettingError, match="channels=\\[12\\]"):
        TrainedPrior([12])
    with pytest.raises(SettingError, match="0 < sigma_min < sigma_max"):
        TrainedPrior([8], sigma_min=2, sigma_max=1)
    with pytest.raises(SettingError, match="lr=0"):
        DiffusionPrior(lr=0)
    with pytest.raises(MissingFile, match="no prior at"):
        TrainedPrior.load(tmp_path / "nothing.safetensors")
    with pytest.raises(MissingFile, match="no folder"):
        PhotoCrops([tmp_path / "nothing"], folders / "validation.txt").setup("fit")
    with pytest.raises(MissingFile, match="no list of names"):
        PhotoCrops([folders / "photos"], tmp_path / "nothing.txt").setup("fit")
    with pytest.raises(SettingError, match="0 are held out"):
        PhotoCrops([folders / "photos" / "n0"], folders / "validation.txt").setup("fit")
    with pytest.raises(SettingError, match="40 pixels"):
        PhotoCrops([folders / "photos"], folders / "validation.txt").setup("fit")


@pytest.mark.parametrize("defect", ["cut", "foreign", "settings", "weights"])
def test_a_file_that_is_no_prior_is_refused(tmp_path: Path, defect: str) -> None:
    path, prior = tmp_path / "prior.safetensors", TrainedPrior([8], layers=1)
    prior.save(path)
    weights = {name: tensor.contiguous() for name, tensor in prior.state_dict().items()}
    facts = {"format": "curious-client diffusion prior 1", "settings": json.dumps(prior.settings)}
    if defect == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif defect == "foreign":
        save_file(weights, path)
    elif defect == "settings":
        save_file(weights, path, facts | {"settings": json.dumps(prior.settings | {"width": 3})})
    else:
        save_file(weights, path, facts | {"settings": json.dumps(prior.settings | {"channels": [16]})})
    with pytest.raises(StorageError, match="cannot be read as a diffusion prior"):
        TrainedPrior.load(path)
