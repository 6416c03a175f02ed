"""Any module as a global model: its head is found and proven, and its parameters keep their names."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_lightning.models import LeNet5, WrappedClassifier
from fl_lightning.models.head import HeadError, HeadSpec
from fl_lightning.observation import build_model, build_on_meta, describe_model
from fl_lightning.storage import save_checkpoint

SHAPE = (3, 16, 16)


class Net(nn.Module):
    """Functional ReLUs, `view`, and layers with the names that an ImageClassifier gives its parts."""

    def __init__(self, classes: int = 5, width: int = 12) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.features = nn.Linear(4 * 8 * 8, width)
        self.mean = nn.Linear(width, classes)
        self.drop = nn.Dropout(0.0)

    def maps(self, x: Tensor) -> Tensor:
        return F.relu(F.max_pool2d(self.norm(self.head(x)), 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maps(x)
        return self.mean(self.drop(F.relu(self.features(x.view(len(x), -1)))))


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm.bias = self.head.bias


class LogProbabilities(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(super().forward(x), 1)


class Tanh(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.mean(torch.tanh(self.features(self.maps(x).flatten(1))))


class Clipped(Net):
    """A ReLU for the small activations of the probe images only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mean(self.features(self.maps(x).flatten(1) / 100).clamp(0, 0.3))


class Probabilities(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


class Rates(Net):
    """Looks at a tensor's values while it is built, as ConvNeXt and Swin do for their rates of dropout."""

    def __init__(self) -> None:
        super().__init__()
        *_, self.drop.p = (rate.item() for rate in torch.linspace(0, 0.5, 3))


def made(width: int = 12) -> Net:
    return Net(5, width)


def made_of_what(width: int = 12):  # noqa: ANN201
    raise AssertionError("A function that does not say what it returns must not be called.")


class Pair(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


def probes() -> Tensor:
    return torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("make", "head", "layers"),
    [
        (Net, "auto", ("features", "mean")),
        (LogProbabilities, "auto", ("features", "mean")),
        (Tanh, "auto", ("mean",)),
        (Net, "mean", ("mean",)),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 5)), "auto", ("1", "3")),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.Linear(8, 5)), "auto", ("2",)),
        (lambda: LeNet5(5, SHAPE), "auto", ("head.0", "head.2")),
        (lambda: LeNet5(5, SHAPE), "head", ("head.0", "head.2")),
    ],
)
def test_the_head_is_found(make: Callable[[], nn.Module], head: str, layers: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    assert HeadSpec.find(make(), probes(), head) == HeadSpec(layers, 5)


@pytest.mark.parametrize(
    ("model_class", "head", "words"),
    [
        (Clipped, "auto", "another activation"),
        (Probabilities, "auto", "does not end in a linear layer"),
        (Pair, "auto", "returns tuple"),
        (Net, "features", "at the end of Net are features, mean"),
        (Net, "classifier", "at the end of Net are features, mean"),
    ],
)
def test_no_head_is_a_sentence(model_class: type[nn.Module], head: str, words: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(HeadError, match=words) as error:
        HeadSpec.find(model_class(), probes(), head)
    assert len(str(error.value)) <= 400


def test_a_wrapped_module_is_the_module_with_its_names_and_comes_back_from_its_description() -> None:
    net = Net()
    model = WrappedClassifier(5, SHAPE, net, mean=(0.5,), std=(0.25,))
    assert list(model.state_dict()) == list(net.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in net.named_parameters()]
    assert model.head_parameters == ["features.weight", "features.bias", "mean.weight", "mean.bias"]
    images, state = probes(), copy.deepcopy(net.state_dict())
    state["features.bias"] += 1
    built = build_model(describe_model(model), state)
    net.load_state_dict(state)
    model.eval(), built.eval(), net.eval()
    torch.testing.assert_close(built(images), net((images - 0.5) / 0.25), rtol=0, atol=0)
    torch.testing.assert_close(built.head(built.embed(images)), built(images))
    assert not torch.allclose(model(images), built(images))  # the model is a copy
    assert all(parameter.is_meta for parameter in build_on_meta(describe_model(model)).parameters())


def test_a_constructor_may_look_at_values() -> None:
    model = build_on_meta(describe_model(WrappedClassifier(5, SHAPE, Rates)))
    assert model.head_parameters[-1] == "mean.bias"
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_class_takes_arguments_and_weights_from_a_file(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in Net(7, 9).state_dict().items()}
    save_checkpoint(tmp_path / "net.pt", {"state_dict": state, "epoch": 3})
    model = WrappedClassifier(7, SHAPE, Net, {"classes": 7, "width": 9}, weights=tmp_path / "net.pt")
    assert all(torch.equal(tensor, state[f"module.{name}"]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("module", [made, f"{__name__}.made"])
def test_a_function_makes_the_module(module: Callable[..., nn.Module] | str) -> None:
    model = WrappedClassifier(5, SHAPE, module, {"width": 9})
    assert model.head[0].out_features == 9
    assert build_model(describe_model(model), model.state_dict()).head[0].out_features == 9
    assert isinstance(WrappedClassifier(5, SHAPE, partial(made, width=7)).features.module, Net)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"module": "os.system"}, "derives from torch.nn.Module"),
        ({"module": made_of_what}, "or a function annotated to return one"),
        ({"module": made, "arguments": {"depth": 3}}, "made cannot be built"),
        ({"module": "not_loaded.Net"}, "derives from torch.nn.Module"),
        ({"module": Net, "arguments": {"depth": 3}}, "cannot be built"),
        ({"module": Net, "arguments": {"classes": 4}}, "has 4 logits, but there are 5"),
        ({"module": Tied}, "has one parameter as head.bias and norm.bias"),
        ({"module": Net, "image_shape": (1, 16, 16)}, "fails on 2 random images"),
    ],
)
def test_a_module_that_does_not_fit_is_a_sentence(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        WrappedClassifier(**{"num_classes": 5, "image_shape": SHAPE, **settings})
    assert len(str(error.value)) <= 400
