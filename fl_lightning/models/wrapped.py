"""A user's own module as a global model, whose parameters keep their names."""

import copy
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, get_type_hints

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from fl_lightning.errors import SettingError, in_short
from fl_lightning.models.classifier import Arguments, ImageClassifier, ImageShape
from fl_lightning.models.head import PROBES, HeadSpec, Trunk
from fl_lightning.state_files import fitted, read_state

WITHIN = "features.module."
"""Prefix of the module's parameters in the wrapper, which its parameter names and state dict leave out."""


class Prototype:
    """A module that was given as an object: copied into every model that is built, the same in every description."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict) -> "Prototype":
        return self


class WrappedClassifier(ImageClassifier):
    """Any module that ends in linear layers, as a global model; its parameters keep the names that they have in it.

    The head is found by running the module on random images (`HeadSpec`). Local training runs the module as it is.

    Args:
        num_classes: number of logits, as the module has.
        image_shape: (C, H, W) of an image.
        module: the class of the module; a function that makes it, such as `torchvision.models.resnet18`, whose
            annotation says that it returns a module; or a module, of which copies are used. A path such as `mynet.Net`
            names a class or function that is loaded already.
        arguments: of the module's class or function, by name.
        head: `auto` for the longest chain of linear layers and ReLUs at the end, or the name of a layer or container in
            the module that limits it.
        weights: a file of initial weights, as `state_files.read_state` reads them; null for those of the constructor.
        mean, std: normalisation of images in [0, 1] before the module, see `ImageClassifier`. The default is none.

    Raises:
        SettingError: the module cannot be built or run on such images, has another number of logits, or has no head of
            linear layers.
        StateError: `weights` cannot be read or does not fit.
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: ImageShape,
        module: type[nn.Module] | Callable[..., nn.Module] | nn.Module | Prototype | str,
        arguments: dict[str, Any] | None = None,
        head: str = "auto",
        weights: Path | None = None,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__(mean, std)
        self.save_hyperparameters(ignore=["module", "weights"])
        self.hparams["module"] = module = _named(module)
        self.hparams["weights"] = None if weights is None else str(weights)
        self.spec = _head_of(module, arguments, image_shape, head, mean, std)
        if self.spec.num_classes != num_classes:
            raise SettingError(
                f"{_shown(module)} has {self.spec.num_classes} logits, but there are {num_classes} classes. Give the "
                "module's `arguments` that make so many, or other data (`data.num_classes`)."
            )
        self.features = Trunk(_made(module, arguments), self.spec.layers[0])
        names: dict[nn.Parameter, str] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if (other := names.setdefault(parameter, name)) != name:
                raise SettingError(
                    f"{_shown(module)} has one parameter as {other} and {name}, but parameters are aggregated by name, "
                    "which would make two of it. Give each module a parameter of its own."
                )
        self.register_state_dict_post_hook(_with_own_names)
        self.register_load_state_dict_pre_hook(_with_names_within)
        if weights is not None and not self.mean.is_meta:
            self.load_state_dict(fitted(read_state(Path(weights)), self.state_dict(), str(weights)))

    @classmethod
    def around(
        cls,
        module: type[nn.Module] | Callable[..., nn.Module] | nn.Module,
        image_shape: ImageShape,
        arguments: dict[str, Any] | None = None,
        head: str = "auto",
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> "WrappedClassifier":
        """With as many classes as the module has logits; arguments as of the constructor."""
        named = _named(module)
        classes = _head_of(named, arguments, image_shape, head, mean, std).num_classes
        return cls(classes, image_shape, named, arguments, head, mean=mean, std=std)

    @property
    def head(self) -> nn.Sequential:
        """(N, D) features -> (N, num_classes) logits: the module's own linear layers, with ReLUs between."""
        return nn.Sequential(*(layer for _, layer in self.head_layers))

    @property
    def head_layers(self) -> list[tuple[str, nn.Module]]:
        linear = [(name, self.features.module.get_submodule(name)) for name in self.spec.layers]
        return [linear[0], *(pair for layer in linear[1:] for pair in (("", nn.ReLU()), layer))]

    def feature_names(self, names: Iterable[str]) -> dict[str, str]:
        in_head = set(self.head_parameters)
        return {name: f"module.{name}" for name in names if name not in in_head}

    def forward(self, images: Tensor) -> Tensor:
        return self.features.module(self.normalise(images))

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            yield name.replace(WITHIN, "", 1), parameter

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        for name, buffer in super().named_buffers(prefix, recurse, remove_duplicate):
            yield name.replace(WITHIN, "", 1), buffer


def _with_own_names(model: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}{WITHIN}")]:
        state[prefix + name.removeprefix(f"{prefix}{WITHIN}")] = state.pop(name)


def _with_names_within(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}{WITHIN}{name.removeprefix(prefix)}"] = state.pop(name)


def _named(module: Callable[..., nn.Module] | nn.Module | Prototype | str) -> Prototype | str:
    """A module in the form in which a description holds it."""
    if isinstance(module, partial):  # jsonargparse's form of a class with `init_args`
        module = module()
    if isinstance(module, nn.Module):
        return Prototype(module)
    return module if isinstance(module, (Prototype, str)) else f"{module.__module__}.{module.__qualname__}"


def _head_of(
    module: str | Prototype,
    arguments: dict[str, Any] | None,
    image_shape: ImageShape,
    head: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> HeadSpec:
    """The head of a module; arguments as of `WrappedClassifier`."""
    asked = {"module": module, "arguments": arguments, "image_shape": image_shape, "head": head}
    return _found(Arguments(WrappedClassifier, {**asked, "mean": mean, "std": std}))


@lru_cache(maxsize=32)
def _found(built_from: Arguments) -> HeadSpec:
    """The head of a described module, with new weights on the CPU, whatever device a model is being built on."""
    asked = built_from.arguments
    with isolate_rng(), torch.device("cpu"):
        torch.manual_seed(0)
        module = _made(asked["module"], asked["arguments"])
        mean, std = (torch.tensor(asked[name]).view(-1, 1, 1) for name in ("mean", "std"))
        images = torch.rand(PROBES, *asked["image_shape"])
        try:
            return HeadSpec.find(module, (images - mean) / std, asked["head"])
        except SettingError:
            raise
        except Exception as error:  # of a user's module
            raise SettingError(
                f"{_shown(asked['module'])} fails on {PROBES} random images of shape {tuple(images.shape[1:])} "
                f"({in_short(error)}). Give the `image_shape` and the `arguments` that it takes."
            ) from error


def _made(module: str | Prototype, arguments: Mapping[str, Any] | None) -> nn.Module:
    """A new module, on the default device and trainable as it was given.

    Raises:
        SettingError: the class or function is not loaded, makes no module, or does not take these arguments.
    """
    if isinstance(module, Prototype):
        return copy.deepcopy(module.module).to(torch.empty(0).device)
    found = _loaded(module)
    if not makes_modules(found):
        raise SettingError(
            f"`module` names '{module}', but no loaded module of Python has a class of this name that derives from "
            "torch.nn.Module, or a function annotated to return one. If you trust it, put its file on the Python path "
            f"and name it yourself: `--federation.model WrappedClassifier --federation.model.module {module}`, or "
            "import it in Python."
        )
    try:
        return found(**(arguments or {}))
    except Exception as error:  # of a user's module
        raise SettingError(
            f"{found.__name__} cannot be built with the arguments {arguments or {}} ({in_short(error)}). Give its own "
            "as `arguments`."
        ) from error


def makes_modules(found: Any) -> bool:
    """Whether something is a class of modules, or a function whose annotation says that it returns one.

    A file may name it, so a function that says nothing of what it returns is never called.
    """
    if inspect.isfunction(found):
        try:
            found = get_type_hints(found).get("return")
        except NameError:  # an annotation of what is not imported
            return False
    return isinstance(found, type) and issubclass(found, nn.Module)


def _loaded(path: str) -> Any:
    """What a dotted path names in a loaded module; None for nothing. The file of an Observation must load no code."""
    names = path.split(".")
    for end in range(len(names) - 1, 0, -1):
        found = sys.modules.get(".".join(names[:end]))
        if found is not None:
            for name in names[end:]:
                found = getattr(found, name, None)
            return found
    return None


def _shown(module: str | Prototype) -> str:
    return type(module.module).__name__ if isinstance(module, Prototype) else module.rpartition(".")[2]
