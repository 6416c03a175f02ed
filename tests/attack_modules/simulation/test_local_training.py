from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from attack_modules.gradient_matching.objectives import Cosine, SquaredL2
from attack_modules.simulation.half_way import model_half_way
from attack_modules.simulation.local_training import SimulatedPeers
from attack_modules.simulation.low_rank import LowRank
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRound
from attack_modules.threat_model.requirements import RequirementError
from fl_lightning.client import LocalTraining, parameters
from fl_lightning.federation import Federation
from fl_lightning.models import (
    VGG7,
    ClassifierFactory,
    ImageClassifier,
    ImageShape,
    LeNet5,
    ResNet9,
    ResNet18,
    TorchvisionClassifier,
)

Observe = Callable[..., ObservedRound]
CPU = torch.device("cpu")


def dense(update: dict[str, Tensor | LowRank]) -> dict[str, Tensor]:
    return {name: tensor.dense() if isinstance(tensor, LowRank) else tensor for name, tensor in update.items()}


def truth_of(observation: ObservedRound, observe: Observe, noise_images: type) -> tuple[Tensor, Tensor]:
    data = noise_images(num_clients=3, images_per_client=2, image_size=16)
    data.setup()
    peers = data.clients[:2]
    return torch.cat([p.images for p in peers]), torch.cat([p.labels for p in peers])


@pytest.mark.parametrize("model", [LeNet5, VGG7, ResNet9])
@pytest.mark.parametrize(
    "training",
    [
        LocalTraining(lr=0.1, local_epochs=1),
        LocalTraining(lr=0.1, local_epochs=3),
        LocalTraining(lr=0.05, local_epochs=3, momentum=0.9, weight_decay=0.1),
    ],
)
def test_simulated_peers_give_what_real_clients_gave(
    observe: Observe, noise_images: type, relative_error: Callable, model: ClassifierFactory, training: LocalTraining
) -> None:
    observation = observe(Federation(model=model, client=training))
    images, labels = truth_of(observation, observe, noise_images)
    simulated = SimulatedPeers(observation, merged=False, device=CPU).mean_update(images, labels)
    # The observed update is a difference of float32 weights: 1e-7 of a weight is 1e-4 of a small update.
    assert relative_error(dense(simulated), observation.peers_update()) < 2e-3


def test_any_head_is_simulated_without_frozen_and_unused_parameters(
    observe: Observe, noise_images: type, relative_error: Callable
) -> None:
    training = LocalTraining(lr=0.1, local_epochs=3, momentum=0.5)
    observation = observe(Federation(model=AnyHead, client=training))
    images, labels = truth_of(observation, observe, noise_images)
    simulated = dense(SimulatedPeers(observation, merged=False, device=CPU).mean_update(images, labels))
    seen = observation.peers_update()
    assert seen.keys() - simulated.keys() == {"features.0.weight", "features.0.bias", "features.unused"}
    assert relative_error(simulated, {name: seen[name] for name in simulated}) < 2e-3


def test_batch_norm_in_train_mode_is_simulated(
    observe: Observe, noise_images: type, relative_error: Callable, batch_norm_classifier: ClassifierFactory
) -> None:
    observation = observe(Federation(model=batch_norm_classifier, client=LocalTraining(lr=0.1)))
    images, labels = truth_of(observation, observe, noise_images)
    before = {name: tensor.clone() for name, tensor in observation.observation.before.items()}
    simulated = SimulatedPeers(observation, merged=False, device=CPU).mean_update(images, labels)
    assert relative_error(dense(simulated), observation.peers_update()) < 2e-3
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in observation.observation.before.items()
    )  # which it shares


def dense_update(
    observation: ObservedRound, training: LocalTraining, images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """One client's local training, with all weights and gradients whole: an independent reading of SGD."""
    model = observation.observation.build_model()
    start = {name: tensor.requires_grad_() for name, tensor in parameters(model).items()}
    weights, velocity = start, dict.fromkeys(start, 0.0)
    size = training.batch_size or len(images)
    for _ in range(training.local_epochs):
        for batch in zip(images.split(size), labels.split(size), strict=True):
            loss = F.cross_entropy(functional_call(model, weights, (batch[0],)), batch[1])
            gradient = torch.autograd.grad(loss, weights.values(), create_graph=True)
            for (name, weight), g in zip(list(weights.items()), gradient, strict=True):
                velocity[name] = training.momentum * velocity[name] + g + training.weight_decay * weight
                weights = {**weights, name: weight - training.lr * velocity[name]}
    return {name: start[name] - weights[name] for name in start}


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class LinearInside(ImageClassifier):
    """Has a linear layer outside the head, like some of torchvision's: that one takes the dense path."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__((0.5,), (0.25,))
        self.save_hyperparameters()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 12), nn.Tanh())
        self.head = nn.Sequential(nn.Linear(12, num_classes))


class AnyHead(ImageClassifier):
    """A head of other layers with parameters, one of them nested; a frozen convolution, and an unused parameter."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__((0.5,), (0.25,))
        self.save_hyperparameters()
        frozen = nn.Conv2d(3, 4, 4, 4).requires_grad_(False)
        self.features = nn.Sequential(frozen, nn.Flatten())
        self.features.register_parameter("unused", nn.Parameter(torch.ones(3)))
        self.head = nn.Sequential(
            nn.LayerNorm(64), nn.Linear(64, 12), nn.PReLU(), nn.Sequential(nn.Linear(12, 12), nn.Sigmoid()),
            nn.Linear(12, num_classes),
        )  # fmt: skip


@pytest.mark.parametrize(
    "training",
    [
        LocalTraining(lr=0.2, local_epochs=2),
        LocalTraining(lr=0.2, local_epochs=1, batch_size=2, momentum=0.5, weight_decay=0.05),
    ],
)
@pytest.mark.parametrize("model", [LeNet5, VGG7, ResNet9, pytest.param(ResNet18, marks=pytest.mark.slow), LinearInside])
def test_factored_simulation_equals_the_dense_one_forward_and_backward(
    observe: Observe, relative_error: Callable, float64: None, model: ClassifierFactory, training: LocalTraining
) -> None:
    observation = observe(Federation(model=model, client=training), num_clients=2, images_per_client=[4, 2])
    images = torch.rand(4, 3, 16, 16, requires_grad=True)
    labels = torch.tensor([1, 1, 0, 7])
    target = {name: tensor.double() for name, tensor in observation.peers_update().items()}
    expected = dense_update(observation, training, images, labels)
    for chunk_size in (None, 1):
        peers = SimulatedPeers(observation, merged=True, device=CPU, chunk_size=chunk_size)
        found = peers.mean_update(images, labels)
        assert relative_error(dense(found), expected) < 1e-10
        for objective in (SquaredL2(), Cosine()):
            losses = [objective(update, target) for update in (found, expected)]
            torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=0)
            slopes = [torch.autograd.grad(loss, images, retain_graph=True)[0] for loss in losses]
            assert relative_error({"images": slopes[0]}, {"images": slopes[1]}) < 1e-8
        assert "of the head" in peers.introduction()
        assert ("outside the head" in peers.introduction()) == (model is LinearInside)


def test_one_step_moves_no_feature_so_that_frozen_convolutions_lose_nothing(
    observe: Observe, relative_error: Callable
) -> None:
    seen = observe(Federation(client=LocalTraining(lr=0.02, local_epochs=1)))
    images, labels = torch.rand(4, 3, 16, 16, requires_grad=True), torch.tensor([1, 1, 0, 7])
    whole = SimulatedPeers(seen, merged=False, device=CPU).mean_update(images, labels)
    expected = {name: whole[name] for name in whole if name.startswith("head.")}
    target = {name: seen.peers_update()[name] for name in expected}
    slope = torch.autograd.grad(SquaredL2()(expected, target), images)[0]
    for chunk_size in (None, 1):
        peers = SimulatedPeers(
            seen, False, CPU, chunk_size=chunk_size, frozen=seen.observation.build_model().requires_grad_(False)
        )
        found = peers.mean_update(images, labels)
        assert relative_error(dense(found), dense(expected)) < 1e-5
        other = torch.autograd.grad(SquaredL2()(found, target), images)[0]
        assert relative_error({"images": other}, {"images": slope}) < 1e-4


def test_frozen_half_way_the_drift_of_features_is_right_to_first_order(
    observe: Observe, noise_images: type, relative_error: Callable
) -> None:
    """Of one peer; the last layer shows it best, because no gates hang on it."""
    data = noise_images(num_clients=2, images_per_client=2, image_size=16)
    data.setup()
    images, labels = data.clients[0].images, data.clients[0].labels
    seen = observe(Federation(client=LocalTraining(lr=0.005, local_epochs=3)), num_clients=2)
    before = {name: tensor.clone() for name, tensor in seen.observation.before.items()}
    half_way = model_half_way([seen.observation], [seen.peers_update()], 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in seen.observation.before.items())
    whole = dense(SimulatedPeers(seen, False, CPU).mean_update(images, labels))["head.2.weight"]
    errors = []
    for frozen in (half_way, seen.observation.build_model().requires_grad_(False)):
        found = dense(SimulatedPeers(seen, False, CPU, frozen=frozen).mean_update(images, labels))["head.2.weight"]
        errors.append(relative_error({"": found}, {"": whole}))
    assert errors[0] < 0.004
    assert errors[0] < errors[1] / 3


def test_an_offset_is_added_to_the_features(observe: Observe, relative_error: Callable) -> None:
    seen = observe(Federation(client=LocalTraining(lr=0.02, local_epochs=1)))
    images, labels, offset = torch.rand(2, 3, 16, 16), torch.arange(2), torch.rand(1024)
    model = seen.observation.build_model()
    loss = F.cross_entropy(model.head(model.embed(images) + offset), labels)
    expected = torch.autograd.grad(loss, model.head[0].weight)[0] * 0.02
    for frozen in (None, seen.observation.build_model()):
        found = SimulatedPeers(seen, True, CPU, frozen=frozen, offset=offset).mean_update(images, labels)
        assert relative_error({"w": found["head.0.weight"].dense()}, {"w": expected}) < 1e-4


def test_what_cannot_be_divided_is_refused(observe: Observe, batch_norm_classifier: ClassifierFactory) -> None:
    seen = observe(Federation(model=batch_norm_classifier, client=LocalTraining(local_epochs=1)))
    with pytest.raises(
        RequirementError, match=r"a model without trained BatchNorm where.*Leave `model.chunk_size` out"
    ):
        SimulatedPeers(seen, True, CPU, chunk_size=2)


def test_a_guessed_client_lr_is_the_one_that_is_simulated(observe: Observe, relative_error: Callable) -> None:
    known, guessed = (
        observe(Federation(client=LocalTraining(local_epochs=1)), Knowledge(client_lr=lr)) for lr in ("known", 0.006)
    )
    images, labels = torch.rand(4, 3, 16, 16), torch.arange(4)
    right, wrong = (dense(SimulatedPeers(o, True, CPU).mean_update(images, labels)) for o in (known, guessed))
    assert relative_error({name: u / 2 for name, u in wrong.items()}, right) < 1e-3


def test_a_merged_client_takes_as_many_steps_as_a_peer(observe: Observe, noise_images: type) -> None:
    observation = observe(Federation(client=LocalTraining(lr=0.01, batch_size=1)))
    images, labels = truth_of(observation, observe, noise_images)
    simulated = SimulatedPeers(observation, merged=True, device=CPU).mean_update(images, labels)
    seen = observation.peers_update()["head.2.weight"].norm()
    assert dense(simulated)["head.2.weight"].detach().norm().item() == pytest.approx(seen.item(), rel=0.1)


def test_dropout_and_unknown_client_sizes_are_refused(observe: Observe) -> None:
    def with_dropout(num_classes: int, image_shape: tuple[int, int, int]) -> TorchvisionClassifier:
        return TorchvisionClassifier(num_classes, image_shape, name="mobilenet_v3_small", dropout=0.2)

    seen = observe(Federation(model=with_dropout, client=LocalTraining(local_epochs=1)), image_size=32)
    with pytest.raises(RequirementError, match=r"without random layers.*is random while it trains.*dropout: 0"):
        SimulatedPeers(seen, True, CPU)
    blind = observe(Federation(), Knowledge(num_clients="inferred"))
    with pytest.raises(RequirementError, match=r"the number of peers.*Give `knowledge.num_clients`"):
        SimulatedPeers(blind, False, CPU)
