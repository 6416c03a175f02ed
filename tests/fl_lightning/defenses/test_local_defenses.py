"""Values of the defences that change local training, against plain PyTorch."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from fl_lightning.client import ClientTask, ClientUpdate, LocalTraining, local_update, parameters
from fl_lightning.data import ImageSet
from fl_lightning.defenses import (
    DPSGD,
    Augmentation,
    ClientDefense,
    Dropout,
    FedProx,
    Mixup,
    PartialSharing,
    Soteria,
)
from fl_lightning.defenses.defense import occasions
from fl_lightning.models import ImageClassifier, WrappedClassifier


class Small(ImageClassifier):
    """A convolution and a head of two layers on images of 6x6."""

    def __init__(self, num_classes: int = 4, image_shape: tuple[int, int, int] = (3, 6, 6)) -> None:
        super().__init__((0.0,), (1.0,))
        self.save_hyperparameters()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, num_classes))


@pytest.fixture
def task() -> ClientTask:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (6, 3, 6, 6), dtype=torch.uint8)
    return ClientTask(Small(), ImageSet(pixels, torch.arange(6) % 4), seed=3)


def trained(task: ClientTask, *defenses: ClientDefense, epochs: int = 1, **settings: object) -> ClientUpdate:
    return local_update(task, LocalTraining(lr=0.1, local_epochs=epochs, defenses=list(defenses), **settings))


def by_hand(
    task: ClientTask, loss: Callable[[ImageClassifier], Tensor], steps: int = 1, optimizer: type = torch.optim.SGD
) -> dict[str, Tensor]:
    """The update of training on a loss with plain PyTorch."""
    model = copy.deepcopy(task.model)
    optimiser = optimizer(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(model).backward()
        optimiser.step()
    return {name: before - model.get_parameter(name).detach() for name, before in parameters(task.model).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-6, rtol=1e-4)


def cross_entropy(task: ClientTask) -> Callable[[ImageClassifier], Tensor]:
    return lambda model: F.cross_entropy(model(task.images.images), task.images.labels)


def test_fed_prox_adds_its_term_to_the_loss(task: ClientTask) -> None:
    def loss(model: ImageClassifier) -> Tensor:
        away = [model.get_parameter(name) - before for name, before in parameters(task.model).items()]
        return cross_entropy(task)(model) + 2.0 / 2 * sum(term.square().sum() for term in away)

    assert_same(trained(task, FedProx(mu=2.0), epochs=3).update, by_hand(task, loss, steps=3))


def test_adam_is_torchs(task: ClientTask) -> None:
    found = trained(task, optimizer="Adam", epochs=2).update
    assert_same(found, by_hand(task, cross_entropy(task), steps=2, optimizer=torch.optim.Adam))
    with pytest.raises(ValueError, match="Adam has a momentum of its own"):
        LocalTraining(optimizer="Adam", momentum=0.9)


def test_mixup_trains_on_mixtures_of_images_and_of_losses(task: ClientTask) -> None:
    found = trained(task, Mixup(lam=0.4)).update
    ((_, own),) = occasions([Mixup(lam=0.4)], {}, task.seed, {})
    generator = torch.Generator().manual_seed(task.seed)  # of the order of images in a batch, in `local_update`
    order = next(iter(task.images.dataloader(None, shuffle=True, generator=generator)))
    images, labels = order
    others = torch.randperm(6, generator=own.generator)

    def loss(model: ImageClassifier) -> Tensor:
        logits = model(0.4 * images + 0.6 * images[others])
        return 0.4 * F.cross_entropy(logits, labels) + 0.6 * F.cross_entropy(logits, labels[others])

    assert_same(found, by_hand(task, loss))


def test_mixup_draws_its_share_from_a_beta_distribution(task: ClientTask) -> None:
    shares = []
    images, labels = torch.eye(2)[:, :, None, None], torch.tensor([0, 1])
    for seed in range(1000):
        ((defense, own),) = occasions([Mixup(alpha=0.5)], {}, seed, {})
        mixed, targets = defense.on_batch(task.model, images, labels, own)
        torch.testing.assert_close(mixed.flatten(1), targets[:, :2])
        shares.append(mixed[0].max().item())
    mixed = torch.tensor([share for share in shares if share < 1])  # where it was mixed with the other: half of them
    assert 400 < len(mixed) < 600
    assert mixed.mean().item() == pytest.approx(0.5 + 1 / math.pi, abs=0.03)  # E max(lam, 1 - lam) of Beta(1/2, 1/2)


def test_augmentation_gives_shifted_and_mirrored_views(task: ClientTask) -> None:
    images = task.images.images
    ((defense, own),) = occasions([Augmentation(crop=1)], {}, 0, {})
    padded = F.pad(images, (1, 1, 1, 1))
    windows = [padded[:, :, top : top + 6, left : left + 6] for top in range(3) for left in range(3)]
    views = torch.stack(windows + [window.flip(-1) for window in windows])
    seen = set()
    for _ in range(20):
        found, labels = defense.on_batch(task.model, images, task.images.labels, own)
        equal = (views == found).flatten(2).all(2)
        assert equal.any(0).all()
        seen |= set(equal.float().argmax(0).tolist())
    assert seen == set(range(18))
    assert torch.equal(labels, task.images.labels)


@pytest.mark.parametrize(("where", "layers"), [("hidden", [2]), ("features", [0]), ("all", [0, 2])])
def test_dropout_drops_inputs_of_linear_layers(task: ClientTask, where: str, layers: list[int]) -> None:
    model, inputs = copy.deepcopy(task.model), {}
    ((defense, own),) = occasions([Dropout(p=0.5, where=where)], {}, 0, {})
    defense.start(model, own)
    for index in (0, 2):
        model.head[index].register_forward_hook(lambda _, args, out, index=index: inputs.update({index: args[0]}))
    model(task.images.images)
    features = model.embed(task.images.images)
    if 0 in layers:
        ratio = (inputs[0] / features)[features > 1e-6]
        torch.testing.assert_close(ratio, torch.where(ratio > 1, 2.0, 0.0))
        assert 0.3 < (ratio > 1).float().mean() < 0.7
    else:
        torch.testing.assert_close(inputs[0], features)
    hidden = model.head[1](model.head[0](features))
    if layers == [2]:
        assert set((inputs[2] / hidden)[hidden > 1e-6].round(decimals=3).tolist()) == {0.0, 2.0}
    model.eval()
    assert torch.equal(model(task.images.images), copy.deepcopy(task.model).eval()(task.images.images))


def test_dropout_is_of_the_task_alone(task: ClientTask) -> None:
    first, second = (trained(task, Dropout(), epochs=2).update for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_soteria_hides_the_most_exposed_columns(task: ClientTask) -> None:
    plain, found = trained(task).update, trained(task, Soteria(percent=20.0, probes=400)).update
    images = task.images.images.clone().requires_grad_()
    features = task.model.embed(images)
    ratios = torch.zeros(64)
    for index in range(64):
        (slope,) = torch.autograd.grad(features[:, index].sum(), images, retain_graph=True)
        value = features[:, index].detach()
        ratios[index] = (slope.flatten(1).norm(dim=1)[value > 0] / value[value > 0]).sum()
    active = (features > 0).any(0)
    hidden = (found["head.0.weight"] == 0).all(0) & active
    expected = active & (ratios < ratios[active].quantile(0.2))
    assert (hidden & expected).sum() >= 0.8 * expected.sum() > 3  # estimated norms change places near the threshold
    torch.testing.assert_close(found["head.0.weight"][:, ~hidden], plain["head.0.weight"][:, ~hidden])
    assert_same({name: found[name] for name in plain if name != "head.0.weight"},
                {name: plain[name] for name in plain if name != "head.0.weight"})  # fmt: skip


def test_partial_sharing_keeps_its_layers_at_the_client(task: ClientTask) -> None:
    result = trained(task, PartialSharing(private=["head.2.*"]))
    plain = trained(task).update
    for name in plain:
        kept = name.startswith("head.2.")
        assert torch.equal(result.update[name], torch.zeros_like(plain[name]) if kept else plain[name])
    own = parameters(task.model)["head.2.weight"] - plain["head.2.weight"]
    assert torch.equal(result.memory["0/head.2.weight"], own)
    again = ClientTask(task.model, task.images, task.seed, result.memory)
    model = copy.deepcopy(task.model)
    model.head[2].load_state_dict({k: result.memory[f"0/head.2.{k}"] for k in ("weight", "bias")})
    alone = trained(ClientTask(model, task.images, task.seed)).update
    assert torch.equal(
        trained(again, PartialSharing(private=["head.2"])).update["head.0.weight"], alone["head.0.weight"]
    )
    with pytest.raises(ValueError, match=r"fit none of the parameters that are trained, which are features\.0\.weight"):
        trained(task, PartialSharing(private=["*bn*"]))


def test_layers_of_a_wrapped_module_are_found_by_their_names() -> None:
    sizes = {"image_size": 8, "patch_size": 4, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 8}
    torch.manual_seed(0)
    model = WrappedClassifier(4, (3, 8, 8), VisionTransformer, {**sizes, "num_classes": 4})
    nn.init.normal_(next(iter(model.head)).weight)
    images = ImageSet(torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8), torch.arange(2))
    task = ClientTask(model, images, seed=3)
    hidden = trained(task, Soteria(percent=30.0, probes=2)).update["heads.head.weight"]
    assert 0 < (hidden == 0).all(0).sum() < hidden.shape[1]
    private = PartialSharing(private=["conv_proj"])
    memory = trained(task, private).memory
    again = trained(ClientTask(model, images, 3, memory), private).memory
    assert not torch.equal(memory["0/conv_proj.weight"], again["0/conv_proj.weight"])


def test_dp_sgd_clips_single_images_and_adds_noise(task: ClientTask) -> None:
    def loss(model: ImageClassifier) -> Tensor:
        total = 0.0
        for image, label in zip(task.images.images, task.images.labels, strict=True):
            single = F.cross_entropy(model(image[None]), label[None])
            norm = torch.stack(
                [g.norm() for g in torch.autograd.grad(single, model.parameters(), retain_graph=True)]
            ).norm()
            total = total + single * (0.3 / norm).clamp(max=1).detach()
        return total / 6

    quiet = trained(task, DPSGD(max_grad_norm=0.3, noise_multiplier=1e-6), epochs=2).update
    assert_same(quiet, by_hand(task, loss, steps=2))
    noisy = trained(task, DPSGD(max_grad_norm=0.3, noise_multiplier=5.0), epochs=2).update
    noise = torch.cat([(noisy[name] - quiet[name]).flatten() for name in quiet])
    assert noise.std().item() == pytest.approx(0.1 * 5.0 * 0.3 / 6 * 2**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("others", "settings", "words"),
    [
        ([Mixup(lam=0.4)], {}, "beside Mixup"),
        ([FedProx(), Soteria()], {}, "beside FedProx, Soteria"),
        ([], {"class_weights": [1.0, 2.0]}, "beside `federation.client.class_weights`"),
    ],
)
def test_dp_sgd_is_refused_where_it_guarantees_nothing(others: list, settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LocalTraining(defenses=[*others, DPSGD()], **settings)
    LocalTraining(defenses=[Augmentation(), DPSGD(), Dropout()])


def test_dp_sgd_asks_for_group_norm(batch_norm_classifier: type[ImageClassifier], task: ClientTask) -> None:
    model = batch_norm_classifier(4, (3, 6, 6))
    with pytest.raises(ValueError, match=r"BatchNorm, which mixes the images of a batch.*GroupNorm"):
        trained(ClientTask(model, task.images, 0), DPSGD())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: FedProx(mu=-1.0), "mu >= 0"),
        (lambda: Mixup(), "either alpha > 0 or lam"),
        (lambda: Mixup(lam=1.0), "either alpha > 0 or lam"),
        (lambda: Augmentation(crop=0, flip=False), "crop >= 1, or 0 with flip"),
        (lambda: Dropout(p=1.0), "p between 0 and 1"),
        (lambda: Soteria(percent=0.0), "percent between 0 and 100"),
        (lambda: PartialSharing(private=[]), "at least one pattern"),
        (lambda: DPSGD(noise_multiplier=0.0), "noise_multiplier > 0"),
        (lambda: DPSGD(delta=1.0), "delta between 0 and 1"),
    ],
)
def test_impossible_settings_are_refused(make: Callable, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_hidden_dropout_needs_hidden_units(linear_classifier: type[ImageClassifier], task: ClientTask) -> None:
    with pytest.raises(ValueError, match=r"head of two linear layers.*where: features"):
        trained(ClientTask(linear_classifier(4, (3, 6, 6)), task.images, 0), Dropout())
