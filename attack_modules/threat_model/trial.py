"""What a model does on random images, where its modules' names do not tell: checked before an attack relies on it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fl_lightning.errors import AuditError, SettingError, in_short
from fl_lightning.models import Arguments, ImageClassifier
from fl_lightning.models.head import PROBES, TOLERANCE, replay, same, same_logits

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class Trial:
    """What was found, each as a clause that goes on after the model's name; None where nothing is wrong.

    Attributes:
        split: why the logits are not `head(features(normalise(images)).flatten(1))`.
        head: why the head is not a chain of linear layers and ReLUs.
        random: the modules that draw random numbers in train mode, with their types, or how it showed otherwise.
        dropout: rate at which the inputs of each of the head's linear layers are dropped in train mode; None if there
            is no such head, or something else is random.
    """

    split: str | None
    head: str | None
    random: str | None
    dropout: tuple[float, ...] | None

    @staticmethod
    def of(model: ImageClassifier) -> "Trial":
        """Of a model's class and arguments, with new weights; tried once. `model` itself may be on the meta device.

        Raises:
            SettingError: the model fails on random images.
        """
        return _tried(model.built_from)


def no_second_derivative(model: ImageClassifier) -> str | None:
    """Why the gradient of a model's parameters cannot be differentiated with respect to images; tried once.

    Attention is computed step by step, as in the simulation: fused, it has no second derivative.

    Args:
        model: its class and arguments are tried with new weights; it may be on the meta device itself.
    """
    return _without_second_derivative(model.built_from)


@lru_cache(maxsize=32)
def _without_second_derivative(built_from: Arguments) -> str | None:
    with isolate_rng():
        torch.manual_seed(0)
        model = built_from.build()
        images = torch.rand(PROBES, *model.hparams["image_shape"], requires_grad=True)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            with sdpa_kernel(SDPBackend.MATH):
                loss = F.cross_entropy(model(images), torch.zeros(PROBES, dtype=torch.long))
                gradient = torch.autograd.grad(loss, trained, create_graph=True, materialize_grads=True)
            sum(part.square().sum() for part in gradient).backward(inputs=[images])
        except RuntimeError as error:  # an operation without second derivative, or one that cuts the graph
            return " ".join(str(error).split())[:150]
    return None


@lru_cache(maxsize=32)
def _tried(built_from: Arguments) -> Trial:
    with isolate_rng():
        torch.manual_seed(0)
        model = built_from.build()
        images = torch.rand(PROBES, *model.hparams["image_shape"])
        try:
            split = split_fault(model, images)
            head = None if split else head_fault(model, images)
            dropout = None if split or head else head_dropout(model, images)
            return Trial(split, head, random_modules(model, images), dropout)
        except AuditError:
            raise
        except Exception as error:  # of a user's model
            raise SettingError(
                f"{type(model).__name__} fails on {PROBES} random images of shape {tuple(images.shape[1:])} "
                f"({in_short(error)}). Correct its `forward`, `embed` or `head`."
            ) from error


@torch.no_grad()
def split_fault(model: ImageClassifier, images: Tensor) -> str | None:
    """Why a model is not its head applied to its features, which the simulation computes one after the other."""
    if not isinstance(model.head, nn.Sequential):
        return f"has a head of type {type(model.head).__name__} where an nn.Sequential is needed"
    held = {id(parameter) for part in (model.features, model.head) for parameter in part.parameters()}
    elsewhere = [name for name, parameter in model.named_parameters() if id(parameter) not in held]
    if elsewhere:
        return f"has parameters outside `features` and `head` ({_listed(elsewhere)})"
    model.eval()
    features, logits = model.embed(images), model(images)
    if features.ndim != 2:
        return f"has features of shape {tuple(features.shape)} where (N, D) is needed"
    if not same_logits(model.head(features), logits):
        return "computes other logits in `forward` than `head(embed(images))`"
    if type(model).embed is ImageClassifier.embed:
        return None
    if not same(model.features(model.normalise(images)).flatten(1), features):
        return "computes other features in `embed` than `features(normalise(images)).flatten(1)`"
    return None


@torch.no_grad()
def head_fault(model: ImageClassifier, images: Tensor) -> str | None:
    """Why a head is not linear layers with ReLUs between: a module that is neither, or other outputs."""
    layers = model.head_layers
    for name, layer in layers:
        if not isinstance(layer, nn.Linear | nn.ReLU | nn.Dropout | nn.Flatten | nn.Identity):
            return f"has a {type(layer).__name__} in its head ({name})"
    if not (layers and isinstance(model.head[0], nn.Linear) and isinstance(model.head[-1], nn.Linear)):
        return "has a head that does not begin and end in a linear layer"
    model.eval()
    features = model.embed(images)
    linear = [layer for layer in model.head if isinstance(layer, nn.Linear)]
    for inputs in (features, torch.randn_like(features)):  # features may all be 0
        if not same(model.head(inputs), replay(linear, inputs)):
            return "has a head that computes something else than its linear layers with a ReLU between each two"
    return None


@torch.no_grad()
def random_modules(model: ImageClassifier, images: Tensor) -> str | None:
    """The innermost modules that draw random numbers in train mode, or how a second pass differs."""
    model.train()
    with _drawing(model) as names:
        first, second = model(images), model(images)
    innermost = sorted(n for n in names if not any(m != n and m.startswith(f"{n}." if n else "") for m in names))
    if innermost:
        types = {name: type(model.get_submodule(name)).__name__ for name in innermost}
        return _listed([f"{name} ({types[name]})" if name else f"{types[name]}.forward" for name in innermost])
    return None if same(first, second) else "two passes of the same images in train mode differ"


def without_dropout(model: nn.Module) -> nn.Module:
    """The same model, whose dropouts do nothing in train mode either."""
    for module in model.modules():
        if isinstance(module, DROPOUTS):
            module.eval()
    return model


@torch.no_grad()
def head_dropout(model: ImageClassifier, images: Tensor) -> tuple[float, ...] | None:
    """Rate at which the inputs of each of the head's linear layers are dropped in train mode; None if more is random.

    The inputs of one pass are compared with what they are without dropout, given the inputs of the layer before: each
    is 0, or the same times `1 / (1 - rate)`.
    """
    linear = [layer for layer in model.head if isinstance(layer, nn.Linear)]
    still = _inputs_of(linear, without_dropout(model.train()), images)[0]
    shown = _inputs_of(linear, model.train(), images)
    rates = []
    for number, inputs in enumerate(shown):
        whole = still if number == 0 else linear[number - 1](shown[number - 1]).relu()
        kept = (inputs != 0) & (whole != 0)
        factor = (inputs[kept] / whole[kept]).median() if kept.any() else torch.ones(())
        if not same(torch.where(inputs != 0, factor * whole, 0.0), inputs) or factor < 1 - TOLERANCE:
            return None
        rates.append(round(max(1 - 1 / factor.item(), 0.0), 4))
    return tuple(rates)


def _inputs_of(layers: Sequence[nn.Module], model: nn.Module, images: Tensor) -> list[Tensor]:
    """The inputs of layers in one pass of a model."""
    inputs: list[Tensor] = []
    handles = [layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0].clone())) for layer in layers]
    model(images)
    for handle in handles:
        handle.remove()
    return inputs


@contextmanager
def _drawing(model: nn.Module) -> Iterator[set[str]]:
    """Collect the names of the modules during whose forward pass torch's random state changes."""
    names: set[str] = set()
    before: list[Tensor] = []

    def enter(*_: object) -> None:
        before.append(torch.get_rng_state())

    def leave(name: str) -> None:
        if not torch.equal(before.pop(), torch.get_rng_state()):
            names.add(name)

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(lambda *_, name=name: leave(name)))
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def _listed(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
