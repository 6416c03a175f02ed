"""Maps in front of a convolution, and BatchNorm in train mode undone, in whole rounds."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.utils import save_image

from attack_modules import BatchStatistics, Convolutions, DiffusionGuidance, FeatureInversion, Refinement
from attack_modules.analytic.typical_head import pink_noise
from attack_modules.attack import Attack, Level, Verdict
from attack_modules.diffusion.denoiser import Denoiser
from attack_modules.feature_inversion import peers_maps
from attack_modules.feature_inversion.batch_statistics import by_peers
from attack_modules.feature_inversion.controls import mean_psnr
from attack_modules.feature_inversion.convolutions import Shown, _convolutions
from attack_modules.feature_inversion.dead_leaves import dead_leaves
from attack_modules.feature_inversion.learned_decoder import LearnedDecoder
from attack_modules.feature_inversion.peers_maps import _filled, _order
from attack_modules.simulation.distributed import Ranks
from attack_modules.threat_model.assumptions import Assumptions
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRound
from fl_lightning.client import LocalTraining
from fl_lightning.defenses import TopK
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


class Grey(Denoiser):
    """Denoises to grey."""

    sigma_min, sigma_max, multiple = 1e-4, 10.0, 1

    def forward(self, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.full_like(noisy, 0.5)


class Normalised(Pooling):
    norm = nn.BatchNorm2d
    strides = 2, 2


class Residual(Pooling):
    """The second block's update shows its input, and the first block's what is in front of that."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__(num_classes, image_shape)
        stem = nn.Conv2d(image_shape[0], 40, 5, stride=2, padding=2), nn.BatchNorm2d(40), nn.ReLU()
        down = nn.Sequential(nn.Conv2d(40, 96, 1, 2, bias=False), nn.BatchNorm2d(96))
        blocks = BasicBlock(40, 40), BasicBlock(40, 96, 2, down)
        nn.init.constant_(blocks[0].bn2.bias, -1.0)  # so that each channel has a zero
        self.features = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Begun(Residual):
    """Residual networks often begin with a BatchNorm of weight 0."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__(num_classes, image_shape)
        nn.init.zeros_(self.features[3].bn2.weight)
        nn.init.zeros_(self.features[3].bn2.bias)


class Deep(Pooling):
    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__(num_classes, image_shape)
        self.head = nn.Sequential(nn.Linear(96, 200), nn.ReLU(), nn.Linear(200, num_classes))


class Patches(Pooling):
    """The images themselves, which are negative and positive after normalisation, pass through the convolution."""

    norm = nn.BatchNorm2d

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__(num_classes, image_shape)
        first = nn.Conv2d(image_shape[0], 96, 8, stride=4, padding=2)
        self.features = nn.Sequential(first, self.norm(96), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(384, num_classes))


class PlainPatches(Patches):
    norm = nn.Identity


class Unpadded(Normalised):
    """Nothing tells the sign: constants are unseen at all pixels, and the mean of ReLU is that of the negative map."""

    strides = 4, 1

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__(num_classes, image_shape)
        self.features[3].padding = 0, 0


class Untracked(Normalised):
    def norm(self, channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels, track_running_stats=False)


class Sigmoids(Pooling):
    """Of which pooled features hardly depend on a map's size."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__(num_classes, image_shape)
        self.features[2], self.features[5] = nn.Sigmoid(), nn.Sigmoid()


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
    before, misfit = Verdict([Level.CERTAIN, Level.CERTAIN, Level.NOT_READ]), torch.tensor([0.005, 0.02, 0.02])
    verdict = shown.limited(before, misfit, pixels=2)
    assert verdict.levels == [Level.CERTAIN, Level.LIKELY, Level.NOT_READ]
    assert verdict.reasons == ["2 images came out with another map than was read"]
    assert shown.limited(before, misfit[:1].expand(3), pixels=2) == before
    open_ = shown.limited(before, misfit, pixels=3)
    assert open_.levels == [Level.UNRELIABLE, Level.UNRELIABLE, Level.NOT_READ]
    assert open_.reasons[1:] == ["a map of 2 numbers leaves an image of 3 open"]


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


@pytest.mark.parametrize(
    ("model", "sizes", "layer"), [(Normalised, [2, 1], "features.3"), (Residual, [1, 1], "features.3.conv1")]
)
def test_images_of_several_peers_through_batch_norm(
    observe: Observe,
    attack: Run,
    monkeypatch: pytest.MonkeyPatch,
    model: type[ImageClassifier],
    sizes: list[int],
    layer: str,
) -> None:
    """Maps, and who trained together, of a single step."""
    gather, divided = Ranks.gather, []
    noted = lambda *of, divisible=True: divided.append(divisible) or gather(*of, divisible=divisible)  # noqa: E731
    monkeypatch.setattr(Ranks, "gather", noted)
    seen = observe(once(model), BLIND, num_clients=3, images_per_client=[*sizes, 2], num_classes=50)
    module = attack(FeatureInversion(convolutions=Convolutions(), statistics=BatchStatistics()), seen, steps=30)
    found = module.reconstruction()
    originals = IMAGES[found.labels]
    assert module.shown.layer == layer
    true = module.model.embed(originals)
    assert ((module.features - true).norm(dim=1) / true.norm(dim=1)).max() < 0.01
    clients = (found.labels >= sizes[0]).long()
    assert found.peers.tolist() in (clients.tolist(), (1 - clients).tolist())
    assert found.features is None and found.consistency_error is None  # a peer's images depend on each other
    misfit = module.misfit(found.images, found.labels)
    assert len(divided) == 31 and not any(divided)
    assert Level.NOT_READ not in module.verdict(misfit).levels  # known images of less contrast show nothing
    flat = originals.mean((2, 3), keepdim=True).expand_as(originals)
    assert mean_psnr(found.images, originals) > mean_psnr(flat, originals) + 3


def test_maps_of_several_peers_take_a_decoder_and_guidance(observe: Observe, attack: Run, tmp_path: Path) -> None:
    for index, image in enumerate(dead_leaves(12, (3, 24, 24))):
        save_image(image, tmp_path / f"{index}.png")
    components = {
        "convolutions": Convolutions(),
        "statistics": BatchStatistics(),
        "decoder": LearnedDecoder([tmp_path], crops=100, cache=tmp_path / "kept"),
        "guidance": DiffusionGuidance(Grey(), weight=0.01, denoise_every=5),
    }
    seen = observe(once(Normalised), BLIND, num_clients=3, images_per_client=[2, 1, 2], num_classes=50)
    module = attack(FeatureInversion(**components), seen, steps=15)
    found = module.reconstruction()
    assert module.shown.layer == "features.3" and len(module.shown.peers.unique()) == 2
    assert (module.guidance.denoised == 0.5).all()
    flat = IMAGES[found.labels].mean((2, 3), keepdim=True).expand_as(found.images)
    assert mean_psnr(found.images, IMAGES[found.labels]) > mean_psnr(flat, IMAGES[found.labels]) + 1
    (kept,) = (tmp_path / "kept").glob("*.ckpt")
    layers = [copy.deepcopy(module.model) for _ in range(2)]
    other = by_peers(layers[1], ["features.whole.1"], [1, 1, 1])
    assert components["decoder"].fitted(layers[0], (3, 16, 16)) and len(list(kept.parent.iterdir())) == 1
    assert components["decoder"].fitted(other, (3, 16, 16)) and len(list(kept.parent.iterdir())) == 2


def test_a_block_that_lets_no_error_pass_is_not_followed_back(observe: Observe, attack: Run) -> None:
    seen = observe(once(Begun), BLIND, num_clients=3, images_per_client=[1, 1, 2], num_classes=50)
    module = attack(FeatureInversion(convolutions=Convolutions(), statistics=BatchStatistics()), seen, steps=1)
    assert module.shown.layer == "features.4.conv1"


def test_maps_that_are_no_numbers_are_of_no_image() -> None:
    """As those read from two steps that were taken for one."""
    maps, model = torch.full((2, 16, 8, 8), torch.nan), Normalised(10, (3, 16, 16))
    assert _order(model, "features.2", maps, torch.rand(2, 96), (3, 16, 16)) is None


def test_what_is_unseen_of_maps_is_the_same_of_all_images_of_a_peer() -> None:
    """The least entry is 0, which only some of a peer's images have where nothing of them is seen."""
    maps = 1 + torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    maps[0, :, 0, 0] = maps[2, :, 3, 3] = 0
    unseen = torch.zeros(1, 4, 4)
    unseen[:, ::3, ::3] = 0.5
    shifted = maps + torch.tensor([0.7, 0.7, -0.2])[:, None, None, None] * (unseen > 0)
    torch.testing.assert_close(_filled(shifted, unseen, [2, 1]), maps)


def test_a_module_that_is_called_several_times_is_no_source() -> None:
    """As the ReLU of a bottleneck block, in place of whose outputs no single map can be put."""
    model = Pooling(10, (3, 16, 16))
    block = Bottleneck(16, 4)
    model.features = nn.Sequential(model.features[0], block, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    path = peers_maps.Path(model.eval(), (3, 16, 16))
    assert path.source["features.1"] == path.source["features.1.conv1"] == "features.0"
    assert path.source["features.1.conv2"] == "features.1.bn1"  # its ReLU is in place
    maps = torch.rand(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    seen = []
    hook = block.conv2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    _order(model, "features.1.bn1", maps, torch.rand(2, 16), (3, 16, 16))
    hook.remove()
    torch.testing.assert_close(seen, [maps.relu()])
    assert maps.min() < 0  # which the ReLU in place has not changed


def test_a_peer_that_could_not_have_trained_alone_is_not_taken() -> None:
    """BatchNorm in train mode refuses an image of which one position is left."""
    model = Normalised(10, (3, 4, 4))
    alone = by_peers(model, ["features.4"], [1, 1])
    assert _order(alone, "features.2", torch.rand(2, 16, 2, 2), torch.rand(2, 96), (3, 4, 4)) is None


def test_maps_are_not_read_again_under_a_known_defence(observe: Observe, attack: Run) -> None:
    """Nor corrected by what refines the head's features."""
    client = LocalTraining(lr=0.1, local_epochs=1, defenses=[TopK(0.999)])
    seen = observe(Federation(model=Deep, client=client), num_clients=3, images_per_client=1, num_classes=50)
    with pytest.warns(UserWarning, match="in whose place"):
        module = attack(FeatureInversion(convolutions=Convolutions(), refinement=Refinement()), seen, steps=16)
    assert module.leakage.defended.reading.resolves > 0
    assert module.shown.layer == "features.3"
    assert "PrunedUpdate, once." in module.introduction()


def test_several_steps_through_batch_norm_leave_the_features(observe: Observe, attack: Run) -> None:
    federation = Federation(model=Normalised, client=LocalTraining(lr=0.1, local_epochs=2))
    seen = observe(federation, BLIND, num_clients=3, images_per_client=[2, 1, 2], num_classes=50)
    with pytest.warns(UserWarning, match="none of these shows maps"):
        module = attack(FeatureInversion(convolutions=Convolutions(), statistics=BatchStatistics()), seen, steps=1)
    assert module.shown is None


@pytest.mark.parametrize("model", [Patches, PlainPatches])
def test_a_single_image_that_is_mostly_negative_keeps_its_sign(
    observe: Observe, attack: Run, model: type[ImageClassifier]
) -> None:
    """Image 0 is darker than the grey that normalisation takes to 0."""
    assert IMAGES[0].mean() < 0.5
    seen = observe(once(model), BLIND, num_clients=2, images_per_client=[1, 3])
    module = attack(FeatureInversion(convolutions=Convolutions(), statistics=BatchStatistics()), seen, steps=20)
    assert module.shown.layer == "features.0"
    assert mean_psnr(module.reconstruction().images, IMAGES[:1]) > 30
    assert "1 image came out with another map than was read" in module.verdict(torch.tensor([0.02])).reasons


@pytest.mark.parametrize("model", [Unpadded, Untracked])
def test_a_map_of_unknown_sign_or_size_is_not_taken(
    observe: Observe, attack: Run, model: type[ImageClassifier]
) -> None:
    seen = observe(once(model), BLIND, num_clients=2, images_per_client=[1, 3])
    with pytest.warns(UserWarning, match="none of these shows maps"):
        module = attack(FeatureInversion(convolutions=Convolutions(), statistics=BatchStatistics()), seen, steps=1)
    assert module.shown is None


def test_the_size_of_a_map_is_told_from_what_biases_make_alone(observe: Observe, attack: Run) -> None:
    seen = observe(once(Sigmoids), BLIND, num_clients=2, images_per_client=[1, 3])
    module = attack(FeatureInversion(convolutions=Convolutions()), seen, steps=1)
    true = module.model.embed(IMAGES[:1])
    assert (module.features - true).norm() < 0.05 * true.norm()


def test_batch_norm_behind_an_activation_in_place_does_not_centre_a_convolution() -> None:
    model = Normalised(10, (3, 16, 16))
    model.features[4] = nn.Sequential(nn.ReLU(inplace=True), model.features[4])
    found = _convolutions(model, (3, 16, 16), frozenset(batch_statistics(model)))
    assert [of.behind for of in found] == ["features.1", None]


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


def test_running_statistics_of_several_steps_are_undone(observe: Observe) -> None:
    client = LocalTraining(lr=1e-6, local_epochs=3)
    seen = observe(Federation(model=Normalised, client=client), num_clients=2, images_per_client=[3, 2])
    model = seen.observation.build_model()
    together = model.embed(IMAGES[:3])
    assert BatchStatistics().freeze(model, seen, 3) is None
    torch.testing.assert_close(model.embed(IMAGES[:3]), together, rtol=1e-3, atol=1e-3)


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
    assert replace(seen, own_buffers={}).peers_buffers() is None
    model = seen.build_model()
    own = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    given = Observation.from_models(seen.before, seen.after, model=model, own=own, own_weight=0.5)
    torch.testing.assert_close(given.own_buffers["features.1.running_mean"], own["features.1.running_mean"])
    assert loaded.peers_buffers().keys() == {f"features.{i}.running_{kind}" for i in (1, 4) for kind in ("mean", "var")}
