"""The search for initial noise: its gradient, what it compares, when it stops, and what it refuses."""

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from attack_modules.analytic.typical_head import pink_noise
from attack_modules.attack import Reconstruction
from attack_modules.diffusion.conditional import ConditionalModel, ddim
from attack_modules.diffusion.released.latent_diffusion import LatentDiffusion, sd_vae
from attack_modules.diffusion.released.mdt import MDTv2
from attack_modules.diffusion.trained.class_conditional import SmallConditional
from attack_modules.enhance.semantic.enhancer import SemanticEnhancer
from attack_modules.enhance.semantic.noise_search import NoiseSearch
from attack_modules.enhance.semantic.reconstructed_image import ReconstructedImage
from cli import main
from fl_lightning.errors import SettingError
from fl_lightning.seeds import seed_of

ROOT = Path(__file__).parents[4]


def tiny() -> SmallConditional:
    """Untrained, so that it denoises like a Wiener filter; the class changes it a little."""
    torch.manual_seed(0)
    model = SmallConditional([8], 1, image_size=16, class_names=["cat", "dog"], guidance=3.0)
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.1)
    return model.eval().requires_grad_(False)


def tiny_latent() -> LatentDiffusion:
    torch.manual_seed(0)
    backbone = MDTv2(width=32, depth=5, heads=2, decoder_depth=1, latent_size=2)
    return LatentDiffusion(backbone, None, sd_vae((16, 16, 32, 32), 1, 8, 16), None, latent_size=2)


def images(count: int = 2, channels: int = 3, size: int = 16) -> Tensor:
    return pink_noise(count, (channels, size, size), seed=3)


def given(pixels: Tensor, latent_downscale: int = 1) -> Reconstruction:
    return Reconstruction(pixels, torch.arange(len(pixels)) % 2, latent_downscale)


@pytest.mark.parametrize("model", [tiny(), tiny_latent()], ids=["pixels", "latents"])
def test_the_gradient_is_exact_for_the_predicted_noises_held_constant(
    model: ConditionalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model.double()
    search = NoiseSearch(model, given(images().double()), timesteps=5, seed=1).double()
    predicted: list[Tensor] = []
    predict = model.noise
    monkeypatch.setattr(model, "noise", lambda *state: predicted.append(predict(*state)) or predicted[-1])
    loss, _ = search.step()
    loss.backward()

    def replayed(noise: Tensor) -> float:
        constants = iter(predicted)
        monkeypatch.setattr(model, "noise", lambda *state: next(constants))
        latents = ddim(model, noise, search.labels, search.timesteps).latents
        return float((search.seen(model.decode(latents)) - search.target).square().mean((1, 2, 3)).sum())

    noise = search.noise.detach()
    assert replayed(noise) == pytest.approx(loss.item(), rel=1e-12)
    for seed in range(3):
        direction = torch.randn(noise.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        step = 1e-6 * direction  # the gain is about 100
        difference = (replayed(noise + step) - replayed(noise - step)) / 2e-6
        assert float((search.noise.grad * direction).sum()) == pytest.approx(difference, rel=1e-5)


def test_the_pixel_loss_falls_and_the_result_depends_on_the_seed_alone() -> None:
    enhancer = SemanticEnhancer(tiny(), lr=0.2, timesteps=3, steps=8, patience=50, chunk_size=1)
    losses: list[float] = []
    enhancer.watch = lambda step, indices, found: losses.append(float(found.pixel_loss[0]))
    first = enhancer.enhance(given(images()), seed=0)
    assert first.shape == (2, 3, 16, 16)
    assert first.min() >= 0 and first.max() <= 1
    assert losses[7] < 0.8 * losses[0]
    torch.manual_seed(5)
    torch.testing.assert_close(enhancer.enhance(given(images()), seed=0), first)
    assert not torch.allclose(enhancer.enhance(given(images()), seed=1), first)


def test_latent_diffusion_is_searched_through_its_decoder() -> None:
    enhancer = SemanticEnhancer(tiny_latent(), class_label="Scotch terrier", lr=0.1, timesteps=4, steps=4)
    assert enhancer.class_label == 199
    assert enhancer.enhance(given(images(1)), seed=0).shape == (1, 3, 16, 16)


def test_only_what_the_reconstruction_shows_is_compared() -> None:
    upsampled = NoiseSearch(tiny(), given(images(), latent_downscale=4), timesteps=2)
    assert upsampled.target.shape == (2, 3, 4, 4)
    grey = NoiseSearch(tiny(), given(images(channels=1)), timesteps=2)
    assert grey.seen(images()).shape == (2, 1, 16, 16)
    larger = SemanticEnhancer(tiny(), timesteps=2, steps=2).enhance(given(images(1, size=40)), seed=0)
    assert larger.shape == (1, 3, 40, 40)
    smaller = SemanticEnhancer(tiny(), timesteps=2, steps=2).enhance(given(images(1, channels=1, size=8)), seed=0)
    assert smaller.shape == (1, 1, 8, 8)


def test_what_was_observed_decides_where_it_is_known() -> None:
    wanted = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def consistency_error(candidates: Tensor, indices: Tensor) -> Tensor:
        return (candidates - wanted[indices]).square().mean((1, 2, 3))

    enhancer = SemanticEnhancer(tiny(), lr=0.1, timesteps=3, steps=6, patience=50, chunk_size=1, margin=0)
    scores: dict[int, list[Tensor]] = {0: [], 1: []}
    samples: dict[int, list[Tensor]] = {0: [], 1: []}

    def watch(step: int, indices: Tensor, found: object) -> None:
        scores[int(indices)].append(found.score[0])
        samples[int(indices)].append(found.images[0])

    enhancer.watch = watch
    result = enhancer.enhance(given(images())._replace(consistency_error=consistency_error), seed=0)
    for image in (0, 1):
        best = int(torch.stack(scores[image]).argmin())
        torch.testing.assert_close(result[image], samples[image][best])
        assert float(scores[image][best]) == pytest.approx(
            float(consistency_error(result[[image]], torch.tensor([image])))
        )


def test_the_noise_keeps_the_length_of_normal_noise() -> None:
    search = NoiseSearch(tiny(), given(images()), timesteps=2)
    direction = search.noise.detach().clone()
    search.noise.data *= torch.tensor([0.5, 3.0]).view(2, 1, 1, 1)
    search.step()
    torch.testing.assert_close(search.noise.detach(), direction)
    assert direction.square().mean((1, 2, 3)).tolist() == pytest.approx([1.0, 1.0])


def test_the_search_stops_when_nothing_improves_or_only_noise_is_left() -> None:
    search = NoiseSearch(tiny(), given(images()), timesteps=2, patience=2)
    search.step()
    search.step()  # the noise stays, so nothing improves
    assert not search.finished.any()
    search.step()
    assert search.finished.all()
    search = NoiseSearch(tiny(), given(images()), timesteps=2)
    search.tolerance[1] = 0.9  # of a very noisy reconstruction
    search.step()
    assert search.finished.tolist() == [False, True]


def test_what_is_within_the_margin_of_the_noise_has_no_more_to_gain() -> None:
    search = NoiseSearch(tiny(), given(images(1)), timesteps=2, margin=0.01)
    _, found = search.step()
    search.tolerance[:] = 0.995 * found.pixel_loss
    assert search.finished.all()
    search.tolerance[:] = 0.98 * found.pixel_loss
    assert not search.finished.any()


def test_every_better_sample_is_kept_and_patience_counts_what_exceeds_the_margin() -> None:
    scores = [1.0, 0.995, 0.997, 0.991, 0.985, 0.98, 0.981, 0.979, 0.978]  # counted: 1, 0.985
    steps = iter(scores)
    best = [(0, False), (1, False), (1, False), (3, False), (4, False), (5, False), (5, False), (7, False), (8, True)]

    def scripted(candidates: Tensor, indices: Tensor) -> Tensor:
        return torch.full((1,), next(steps))

    search = NoiseSearch(
        tiny(), given(images(1))._replace(consistency_error=scripted), timesteps=2, patience=4, margin=0.012
    )
    for step, expected in enumerate(best):
        search.noise.data.normal_(generator=torch.Generator().manual_seed(step))
        _, found = search.step()
        assert (int(search.best_step), bool(search.finished)) == expected
        if expected[0] == step:
            torch.testing.assert_close(search.best, found.images)
        assert float(search.best_score) == pytest.approx(min(scores[: step + 1]))


def test_a_checkpoint_of_an_earlier_version_goes_on() -> None:
    enhancer = SemanticEnhancer(tiny(), class_label="cat", timesteps=2)
    enhancer.found = enhancer.search(given(images(1)), seed=0)
    enhancer.found.step()
    whole = {name: tensor.clone() for name, tensor in enhancer.state_dict().items()}
    earlier = {name: tensor for name, tensor in whole.items() if "counted" not in name}
    enhancer.on_load_checkpoint({"state_dict": earlier})
    assert {name: tensor.tolist() for name, tensor in earlier.items()} == {n: t.tolist() for n, t in whole.items()}


def test_an_image_whose_search_has_ended_is_sampled_no_more_and_stays() -> None:
    search = NoiseSearch(tiny(), given(images()), timesteps=2)
    search.tolerance[0] = 1.0
    search.step()
    kept = search.best[0].clone()
    search.noise.data.normal_(generator=torch.Generator().manual_seed(9))
    loss, found = search.step()
    assert found.active.tolist() == [1]
    torch.testing.assert_close(search.best[0], kept)
    loss.backward()
    assert search.noise.grad[0].abs().max() == 0 < search.noise.grad[1].abs().max()
    search.tolerance[1] = 1.0
    assert search.step()[1].active.tolist() == [0, 1]  # a run that is resumed after its end looks once more


def test_an_image_does_not_depend_on_those_beside_it() -> None:
    def enhanced(reconstruction: Reconstruction, chunk_size: int) -> Tensor:
        enhancer = SemanticEnhancer(tiny(), lr=0.1, timesteps=3, steps=6, starts=2, patience=1, chunk_size=chunk_size)
        return enhancer.enhance(reconstruction, seed=0)

    whole = enhanced(given(images(4)), chunk_size=4)
    torch.testing.assert_close(enhanced(given(images(4)), chunk_size=3), whole)
    alone = enhanced(given(images(4)).part(torch.tensor([3, 1])), chunk_size=2)
    torch.testing.assert_close(alone, whole[[3, 1]])
    assert enhanced(given(images(4)).part(torch.arange(0)), chunk_size=2).shape == (0, 3, 16, 16)


def test_the_best_of_several_starts_goes_on() -> None:
    several = NoiseSearch(tiny(), given(images(1)), 2, starts=4, seed=0)
    losses = []
    for draw in torch.randn(4, 1, 3, 16, 16, generator=torch.Generator().manual_seed(seed_of(0, 0))):
        alone = NoiseSearch(tiny(), given(images(1)), 2)
        alone.noise.data = draw
        losses.append(alone.step()[0].item())
    assert len(set(losses)) == 4
    assert several.step()[0].item() == pytest.approx(min(losses), rel=1e-5)


def test_what_it_refuses() -> None:
    with pytest.raises(SettingError, match=r"square RGB or grey images, .* but got \(3, 16, 12\)"):
        NoiseSearch(tiny(), given(torch.rand(1, 3, 16, 12)))
    with pytest.raises(SettingError, match=r"has 2 classes, cat to dog, but the labels \[2, 900\] are not among"):
        NoiseSearch(tiny(), Reconstruction(images(3), torch.tensor([1, 900, 2])))
    with pytest.raises(SettingError, match=r"no class 'cta'.*'cat'"):
        SemanticEnhancer(tiny(), class_label="cta")
    with pytest.raises(SettingError, match="`timesteps` is 1001, but the diffusion model has 1000"):
        SemanticEnhancer(tiny(), timesteps=1001)
    with pytest.raises(SettingError, match="lr > 0"):
        SemanticEnhancer(tiny(), lr=0)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tiny().save(tmp_path / "tiny.safetensors")
    Image.fromarray((images(1, 1)[0, 0] * 255).byte().numpy()).resize((40, 30)).save(tmp_path / "grey.png")
    return ["fit", "--config", str(ROOT / "configs/semantic.yaml"), "--data.image", "grey.png",
            "--model.model", "TrainedConditional", "--model.model.weights", "tiny.safetensors",
            "--model.class_label", "Dog", "--model.timesteps", "4", "--model.checkpoint_every", "2",
            "--trainer.max_steps", "6", "--trainer.accelerator", "cpu"]  # fmt: skip


def test_one_image_by_command_and_resume(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(command)
    run = Path("runs/semantic/version_0")
    results = json.loads((run / "results.json").read_text())
    assert results["class"] == "dog"
    assert results["pixel_loss_best"] < results["pixel_loss_first"]
    rows = list(csv.DictReader((run / "steps.csv").open()))
    assert [row["step"] for row in rows] == list("012345")
    assert Image.open(run / "semantic.png").size == (16, 16)
    assert (run / "panel.png").exists()
    assert "The reconstruction is grey: the model generates all colours" in capsys.readouterr().out
    assert (run / "checkpoints/last.ckpt").stat().st_size < 100_000  # the search, not the model

    main([*command, "--trainer.max_steps", "4"])
    main([*command, "--ckpt_path", "runs/semantic/version_1/checkpoints/last.ckpt"])
    resumed = Path("runs/semantic/version_2")
    assert (resumed / "steps.csv").read_text() == (run / "steps.csv").read_text()
    assert (resumed / "semantic.png").read_bytes() == (run / "semantic.png").read_bytes()
    with pytest.raises(SettingError, match="of another image or another class"):
        main([*command, "--model.class_label", "0", "--ckpt_path", str(run / "checkpoints/last.ckpt")])


def test_an_image_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"The image '.*gone.png' cannot be read .* Correct the path"):
        ReconstructedImage(tmp_path / "gone.png")
    Image.new("RGB", (8, 9)).save(tmp_path / "small.png")
    assert ReconstructedImage(tmp_path / "small.png").image.shape == (3, 8, 8)
    with pytest.raises(SettingError, match=r"is 9, but .* has 8 pixels per side"):
        ReconstructedImage(tmp_path / "small.png", latent_downscale=9)
