from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from attack_modules import FeatureInversion
from attack_modules.attack import Attack
from attack_modules.evaluation.assignment import match
from attack_modules.feature_inversion.controls import mean_psnr
from attack_modules.feature_inversion.dead_leaves import dead_leaves
from attack_modules.feature_inversion.decoder import FeatureDecoder
from attack_modules.feature_inversion.learned_decoder import LearnedDecoder
from attack_modules.feature_inversion.objective import Objective
from attack_modules.priors import TotalVariation
from attack_modules.threat_model.knowledge import Knowledge
from fl_lightning.client import LocalTraining
from fl_lightning.federation import Federation
from fl_lightning.models import ImageClassifier, ImageShape, TorchvisionClassifier
from fl_lightning.observation import Observation

Observe = Callable[..., Observation]
Run = Callable[..., Attack]
BLIND = Knowledge(labels="inferred", label_counts="inferred", num_images="inferred")
WIDE = {"num_clients": 3, "images_per_client": 2, "num_classes": 50}


def test_images_of_an_aggregate_are_read_blindly(observe: Observe, attack: Run, noise_images: type) -> None:
    """Neither labels nor the number of images are told; nothing but the head's update is used."""
    seen = observe(Federation(client=LocalTraining(local_epochs=1)), BLIND, **WIDE)
    module = attack(FeatureInversion(lr=0.1, prior_limit=(0.3, 0.001), chunk_size=3), seen, steps=200)
    images, labels = module.reconstruction()[:2]
    assert labels.sort().values.tolist() == [0, 1, 2, 3]
    data = noise_images(**WIDE, image_size=16)
    data.setup()
    originals = torch.cat([peer.images for peer in data.clients[:2]])
    order = match(images, originals)
    features = seen.observation.build_model().embed(originals)
    error = (module.leakage.features[order] - features).norm(dim=1) / features.norm(dim=1)
    assert error.max() < 1e-2
    with torch.no_grad():  # noise has no natural colours, so its features are what can be judged
        assert module.feature_error(images, module.features).max() < 0.03
    misfit = module.misfit(originals[order.argsort()], labels)
    assert misfit.shape == (4,)
    assert (misfit < 0.05).all()
    assert (module.misfit(1 - images, labels) > 0.3).all()
    assert "holds 4 images" in module.introduction()
    assert "refined.yaml" not in module.introduction()  # such small steps need none


def test_images_do_not_feel_each_other_and_chunks_do_not_matter(observe: Observe, attack: Run) -> None:
    seen = observe(Federation(client=LocalTraining(local_epochs=1)), **WIDE)
    whole, chunked = (attack(FeatureInversion(chunk_size=size), seen, steps=5) for size in (4, 1))
    torch.testing.assert_close(whole.images, chunked.images, rtol=1e-3, atol=1e-3)


def test_the_last_quarter_of_a_run_in_mixed_precision_and_its_priors_are_in_float32(
    observe: Observe, attack: Run
) -> None:
    seen, mixed, of_prior = observe(Federation(client=LocalTraining(local_epochs=1)), **WIDE), [], []

    class Noting(TotalVariation):
        def __call__(self, images: Tensor) -> Tensor:
            of_prior.append(torch.is_autocast_enabled("cpu"))
            return super().__call__(images)

    class Watched(FeatureInversion):
        def _descend(self, chunk: Tensor) -> Tensor:
            mixed.append(torch.is_autocast_enabled("cpu"))
            return super()._descend(chunk)

    attack(Watched(priors=[Noting(1.0)]), seen, steps=8, precision="bf16-mixed")
    assert mixed == [True] * 6 + [False] * 2
    assert not any(of_prior)


def test_priors_count_by_their_relative_change_up_to_a_limit(observe: Observe, attack: Run) -> None:
    seen = observe(Federation(client=LocalTraining(local_epochs=1)), **WIDE)

    def images(weight: float, **settings: object) -> Tensor:
        priors = [TotalVariation(weight)] if weight else []
        return attack(FeatureInversion(priors=priors, **settings), seen, steps=5).images

    free = {"prior_limit": (1e9, 1e9)}
    torch.testing.assert_close(images(128.0, **free), images(1.0, **free), rtol=0, atol=1e-4)
    assert (images(1.0, **free) - images(0.0)).abs().max() > 0.01
    bounded = images(1.0, prior_limit=(1e-9, 1e-9))
    torch.testing.assert_close(bounded, images(0.0), rtol=0, atol=1e-4)
    torch.testing.assert_close(images(1.0, balance=0.0), images(0.0), rtol=0, atol=1e-4)


def test_the_rate_falls_slowly_and_then_fast(observe: Observe, attack: Run) -> None:
    rates = []

    class Watched(FeatureInversion):
        def training_step(self, batch: int, batch_idx: int) -> None:
            rates.append(self.optimizers().param_groups[0]["lr"])
            super().training_step(batch, batch_idx)

    module = attack(Watched(lr=0.2), observe(Federation(client=LocalTraining(local_epochs=1)), **WIDE), steps=4)
    rates.append(module.trainer.optimizers[0].param_groups[0]["lr"])
    assert rates == pytest.approx([0.2 * 0.02 ** (share**2.7) for share in (0, 0.25, 0.5, 0.75, 1)])


def test_it_begins_with_decoded_images(observe: Observe, attack: Run) -> None:
    seen = observe(Federation(client=LocalTraining(local_epochs=1)), **WIDE)
    module = attack(FeatureInversion(), seen, steps=1)  # the one step scores what it began with
    torch.testing.assert_close(module.best, FeatureDecoder(module.model, (3, 16, 16))(module.features))
    assert "linearly decoded images" in module.introduction()


def test_it_begins_with_grey_images_if_the_features_are_no_map(observe: Observe, attack: Run) -> None:
    resnet = partial(TorchvisionClassifier, name="resnet18")
    seen = observe(Federation(model=resnet, client=LocalTraining(local_epochs=1)), **WIDE)
    module = attack(FeatureInversion(), seen, steps=1)
    assert (module.best == 0.5).all()
    assert "grey images, since the features are not a map" in module.introduction()
    assert module.images.isfinite().all()  # though a grey image has no variation to compare with
    assert attack(FeatureInversion(balance=0.0), seen, steps=1).images.isfinite().all()


class Pooled(ImageClassifier):
    """Its features are means over a third of the image in each direction, which divide no image of 16 pixels."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__((0.5,), (0.25,))
        self.save_hyperparameters()
        self.features = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(27, num_classes))


def test_an_iterate_that_shows_the_features_ranks_before_a_flat_one(
    observe: Observe, attack: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = observe(Federation(model=Pooled, client=LocalTraining(local_epochs=1)), BLIND, **WIDE)
    module = attack(FeatureInversion(), seen, steps=1)
    images = torch.stack([torch.rand(3, 16, 16), torch.full((3, 16, 16), 0.5)])
    features = 1.05 * module.model.embed(images[:1]).expand(2, -1)

    def ranks() -> Tensor:
        return module.objective.losses(images, features, 0, 1, None, None)[1][:, 1]

    assert ranks()[0] < ranks()[1]
    monkeypatch.setattr("attack_modules.feature_inversion.objective.EXPLAINS", 2.0)  # as if grey explained them
    assert ranks()[0] > ranks()[1]


def test_decoded_images_are_kept_where_known_ones_are_not_improved(
    observe: Observe, attack: Run, linear_classifier: type, tmp_path: Path
) -> None:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index, image in enumerate(dead_leaves(12, (3, 24, 24))):
        Image.fromarray((255 * image).byte().permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    decoder = LearnedDecoder([folder], crops=100, cache=tmp_path / "decoders")
    seen = observe(Federation(model=Pooled, client=LocalTraining(local_epochs=2)), BLIND, **WIDE)
    module = attack(FeatureInversion(decoder=decoder), seen, steps=1)  # which scores the start alone
    assert not module.inverts
    assert module.title == "FeatureInversion + LearnedDecoder"  # else its results would pass for those without
    torch.testing.assert_close(module.best, module._start(module.features), rtol=0, atol=1e-6)
    assert "27 distinct features, which are kept" in module.introduction()
    verdict = module.verdict(module.misfit(module.best, module.labels))
    known = module._starter[0].known
    best = mean_psnr(module._starter[0](module.model.embed(known)), known)
    assert best - 3 < min(verdict.expected_psnr) <= max(verdict.expected_psnr) < best + 0.1
    exact = observe(Federation(model=linear_classifier, client=LocalTraining(local_epochs=1)), BLIND, **WIDE)
    assert attack(FeatureInversion(decoder=decoder), exact, steps=30).inverts


def test_the_verdict_takes_what_is_forecast(observe: Observe, attack: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second look at the update, and the time of the first steps, which are as many images' as all others."""
    seen = observe(Federation(client=LocalTraining(local_epochs=1)), BLIND, **WIDE)
    module = attack(FeatureInversion(), seen, steps=10)
    passed, losses = [], Objective.losses

    def counted(self: Objective, images: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        passed.append(len(images))
        return losses(self, images, *rest)

    monkeypatch.setattr(Objective, "losses", counted)
    monkeypatch.setattr(Attack, "update_of", None)
    monkeypatch.setattr("attack_modules.feature_inversion.inversion.time.perf_counter", lambda: sum(passed))
    said = module.seconds_of_verdict()
    passed.clear()
    module.verdict(module.misfit(module.best, module.labels))
    assert sum(passed) == pytest.approx(said, rel=0.2)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="chunk_size >= 1"):
        FeatureInversion(chunk_size=0)
    with pytest.raises(ValueError, match="balance=-1"):
        FeatureInversion(balance=-1)
