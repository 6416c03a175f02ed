"""Maps in front of a convolution, and BatchNorm in train mode undone, in whole rounds."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from attack_modules import BatchStatistics, Convolutions, FeatureInversion
from attack_modules.analytic.typical_head import pink_noise
from attack_modules.attack import Attack, Level, Verdict
from attack_modules.feature_inversion.controls import mean_psnr
from attack_modules.feature_inversion.convolutions import Shown
from attack_modules.threat_model.assumptions import Assumptions
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRound
from fl_lightning.client import LocalTraining
from fl_lightning.federation import Federation
from fl_lightning.models import ImageClassifier, ImageShape
from fl_lightning.models.freezing import batch_statistics
from fl_lightning.observation import Observation

Observe = Callable[..., ObservedRound]
Run = Callable[..., Attack]
BLIND = Knowledge(labels="inferred", label_counts="inferred", num_images="inferred", num_clients="inferred")
IMAGES = (pink_noise(64, (3, 16, 16), seed=7) * 255).round() / 255


class Pooling(ImageClassifier):
    """Two convolutions, of which global pooling leaves 96 numbers."""

    norm: type[nn.Module] | None = None
    strides = 4, 1

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__((0.5,), (0.25,))
        self.save_hyperparameters()
        norms = [self.norm(16), self.norm(96)] if self.norm else [nn.Identity(), nn.Identity()]
        first = nn.Conv2d(image_shape[0], 16, 5, stride=self.strides[0], padding=2)
        second = nn.Conv2d(16, 96, 3, stride=self.strides[1], padding=1)
        layers = first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Linear(96, num_classes))


class Normalised(Pooling):
    norm = nn.BatchNorm2d
    strides = 2, 2


def once(model: type[ImageClassifier], **settings: object) -> Federation:
    return Federation(model=model, client=LocalTraining(lr=0.1, local_epochs=1), **settings)


def test_maps_take_the_place_of_features(observe: Observe, attack: Run) -> None:
    """In the order of the labels, and of the right size."""
    seen = observe(once(Pooling), BLIND, num_clients=3, images_per_client=[2, 2, 1], num_classes=50)
    module = attack(FeatureInversion(convolutions=Convolutions()), seen, steps=60)
    assert module.shown.layer == "features.3"
    found = module.reconstruction()
    originals = IMAGES[found.labels]
    true = found.embed(originals)
    assert ((found.features - true).norm(dim=1) / true.norm(dim=1)).max() < 0.01
    plain = attack(FeatureInversion(), seen, steps=60).reconstruction()
    assert mean_psnr(found.images, originals) > mean_psnr(plain.images, IMAGES[plain.labels]) + 1
    assert module.title == "FeatureInversion + Convolutions"
    assert "in front of features.3" in module.introduction()


def test_an_image_that_misses_its_map_is_not_certain() -> None:
    shown = Shown(nn.Identity(), torch.ones(3, 2), torch.full((3,), 0.01), "features.3")
    verdict = shown.limited(Verdict([Level.CERTAIN, Level.CERTAIN, Level.NOT_READ]), torch.tensor([0.005, 0.02, 0.02]))
    assert verdict.levels == [Level.CERTAIN, Level.LIKELY, Level.NOT_READ]
    assert verdict.reasons == ["2 images came out with another map than was read"]


def test_too_many_images_leave_the_features(observe: Observe, attack: Run) -> None:
    seen = observe(once(Pooling), BLIND, num_clients=3, images_per_client=[4, 4, 1], num_classes=50)
    with pytest.warns(UserWarning, match="none has as many outputs as there are positions of all images"):
        module = attack(FeatureInversion(convolutions=Convolutions()), seen, steps=1)
    assert module.shown is None
    assert module.features.shape[1] == 96


def test_a_single_image_through_batch_norm(observe: Observe, attack: Run) -> None:
    seen = observe(once(Normalised), BLIND, num_clients=2, images_per_client=[1, 3])
    module = attack(FeatureInversion(convolutions=Convolutions(), statistics=BatchStatistics()), seen, steps=60)
    found = module.reconstruction()
    true = found.embed(IMAGES[:1])
    assert module.shown.layer == "features.3"
    assert (found.features - true).norm() < 0.01 * true.norm()
    assert mean_psnr(found.images, IMAGES[:1]) > 17


def test_batch_norm_is_undone_for_all_images_of_a_peer(observe: Observe, attack: Run) -> None:
    """Each image alone then has the features that it had among the others."""
    seen = observe(once(Normalised), BLIND, num_clients=2, images_per_client=[3, 2])
    module = attack(FeatureInversion(statistics=BatchStatistics()), seen, steps=1)
    together = seen.observation.build_model().embed(IMAGES[:3])
    assert not batch_statistics(module.model)
    alone = torch.cat([module.model.embed(image[None]) for image in IMAGES[:3]])
    torch.testing.assert_close(alone, together.detach(), rtol=1e-3, atol=1e-3)
    kept = observe(once(Normalised, share_buffers=False), BLIND, num_clients=2, images_per_client=[3, 2])
    with pytest.warns(UserWarning, match="statistics are not shared"):
        attack(FeatureInversion(statistics=BatchStatistics()), kept, steps=1)


def test_a_wrapped_model_is_read_under_its_own_names(attack: Run) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*Normalised(10, (3, 16, 16)).features, nn.Linear(96, 10))
    trained = copy.deepcopy(net)
    nn.functional.cross_entropy(trained(IMAGES[:1]), torch.tensor([3])).backward()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter -= 0.1 * parameter.grad
    seen = ObservedRound(
        Observation.from_models(net, trained, model=net, image_shape=(3, 16, 16)),
        Assumptions(client_lr=0.1, local_epochs=1),
    )
    module = attack(FeatureInversion(convolutions=Convolutions(), statistics=BatchStatistics()), seen, steps=1)
    true = module.model.embed(IMAGES[:1])
    assert (module.features - true).norm() < 0.01 * true.norm()
    assert module.shown.layer.endswith(".3")


def test_an_observation_keeps_the_own_buffers(observe: Observe, tmp_path: object) -> None:
    seen = observe(once(Normalised), BLIND, num_clients=2, images_per_client=[1, 3]).observation
    seen.save(tmp_path / "seen")
    loaded = Observation.load(tmp_path / "seen")
    torch.testing.assert_close(loaded.own_buffers, seen.own_buffers)
    assert loaded.peers_buffers().keys() == {f"features.{i}.running_{kind}" for i in (1, 4) for kind in ("mean", "var")}
