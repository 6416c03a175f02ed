"""What a seat in a federation received in one round."""

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fl_lightning.client import Tensors, parameters
from fl_lightning.errors import SettingError, in_short
from fl_lightning.models import Arguments, ImageClassifier, ImageShape, WrappedClassifier
from fl_lightning.models.freezing import freeze
from fl_lightning.models.wrapped import Prototype
from fl_lightning.state_files import State, completed, fitted
from fl_lightning.storage import StorageError, load_record, save_record

VERSION = 2
"""Of the files. Version 1 also held what the attacker assumed of its peers, which is now the attack's own setting."""


@dataclass(frozen=True)
class Observation:
    """What crossed the wire in one round, seen from one seat, and nothing else.

    An *update* is parameters before minus after, so it points like a gradient.

    Attributes:
        round: number of the round, from 0.
        before: the global model `w_t`, parameters and buffers by name.
        after: the global model `w_{t+1}`; or that of a single client, of which a curious server has the update.
        own_update: the update `u_A` of the observing client, or the mean of those that collude; empty if none trained.
        own_weight: its aggregation weight `p_A` in [0, 1), 0 if it did not train.
        model: `class_path` and `init_args` of the architecture, which every client knows.
        own_buffers: the observing client's buffers after its own training (or the mean of those that collude), by name;
            empty where it did not train, or in files of version 0.1.
    """

    round: int
    before: Tensors
    after: Tensors
    own_update: Tensors
    own_weight: float
    model: dict[str, Any]
    own_buffers: Tensors = field(default_factory=dict)

    @classmethod
    def from_models(
        cls,
        before: nn.Module | State,
        after: nn.Module | State,
        *,
        model: nn.Module,
        image_shape: ImageShape | None = None,
        own: nn.Module | State | None = None,
        own_weight: float = 0.0,
        round: int = 0,
        head: str = "auto",
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> "Observation":
        """Of the global models of any system, each a module, its state dict, or its tensors in that order.

        Args:
            before: the global model before the round.
            after: the global model after it.
            model: a module of their architecture, which is not changed; its own weights matter only for layers that the
                states lack, where they hold the head alone.
            image_shape: (C, H, W) of an image; an `ImageClassifier` tells it.
            own: the observing client's model after its own training in the round; None if it did not train.
            own_weight: its share of all examples of the round, in [0, 1).
            round: number of the round.
            head: of a module that is no `ImageClassifier`, see `WrappedClassifier`.
            mean: by which such a module's images are normalised before it; the default is none.
            std: likewise.

        Raises:
            SettingError: the image shape is missing or does not fit, the module has no head of linear layers, or
                `own_weight` is not in [0, 1) or says otherwise than `own` whether the observing client trained.
            StateError: a state does not fit the module.
        """
        if not 0 <= own_weight < 1 or (own_weight > 0) != (own is not None):
            raise SettingError(
                f"`own_weight` is {own_weight} {'without' if own is None else 'with'} an `own` model. Give both, the "
                "weight above 0 and below 1 (the observing client's share of all examples of the round), or neither if "
                "it did not train."
            )
        states = {"before": before, "after": after, **({} if own is None else {"own": own})}
        expected = model.state_dict()
        found = {name: state.state_dict() if isinstance(state, nn.Module) else state for name, state in states.items()}
        if any(len(state) < len(expected) for state in found.values()):
            known = isinstance(model, ImageClassifier)
            shape = () if known else _needed(image_shape, model)
            wrapped = model if known else WrappedClassifier.around(model, shape, None, head, mean, std)
            names = wrapped.head_parameters
            found = {name: completed(state, expected, names, f"`{name}`") for name, state in found.items()}
        fit = {name: fitted(state, expected, f"`{name}`") for name, state in found.items()}
        if not isinstance(model, ImageClassifier):
            module = copy.deepcopy(model)
            module.load_state_dict(fit["before"])  # new weights might hide the head, e.g. zeros
            model = WrappedClassifier.around(module, _needed(image_shape, model), None, head, mean, std)
        elif image_shape is not None and tuple(image_shape) != tuple(model.hparams["image_shape"]):
            raise SettingError(
                f"`image_shape` is {tuple(image_shape)}, but {type(model).__name__} was made for "
                f"{tuple(model.hparams['image_shape'])}. Leave it out, or make another model."
            )
        trained = parameters(model) if "own" in fit else {}
        own_update = {name: fit["before"][name] - fit["own"][name] for name in trained}
        own_buffers = {name: tensor for name, tensor in fit.get("own", {}).items() if name not in trained}
        return cls(round, fit["before"], fit["after"], own_update, own_weight, describe_model(model), own_buffers)

    def build_model(self, shared: bool = False) -> ImageClassifier:
        """The global model `w_t`, ready to run; what the round left as it was is frozen in it.

        Args:
            shared: use the tensors of `before` themselves, to save memory; they must then not be changed in place.

        Raises:
            StorageError: the model class is unknown, or does not have the observed tensors' names and shapes.
        """
        return freeze(build_model(self.model, self.before, shared), self.unchanged)

    @cached_property
    def unchanged(self) -> frozenset[str]:
        """Names of the parameters and buffers that the round left exactly as they were, as what is frozen."""
        return frozenset(name for name, tensor in self.before.items() if torch.equal(tensor, self.after[name]))

    def aggregated_update(self, server_lr: float) -> Tensors:
        """`u = (w_t - w_{t+1}) / server_lr`: the weighted mean of all clients' updates, by parameter name."""
        return {
            name: (self.before[name] - self.after[name]).div_(server_lr)
            for name in refuse_unfit(self.model, self.before)
        }

    def peers_update(self, server_lr: float) -> Tensors:
        """`u_peers = (u - p_A u_A) / (1 - p_A)`: the weighted mean of the peers' updates, by parameter name."""
        return self.without_own(self.aggregated_update(server_lr))

    def without_own(self, update: Tensors) -> Tensors:
        """The mean update of the others, from that of all clients, which is overwritten; by parameter name."""
        for name, own in self.own_update.items():
            update[name].sub_(own, alpha=self.own_weight)  # a head has 100 MB and more: computed in place
        return {name: mean.div_(1 - self.own_weight) for name, mean in update.items()}

    def peers_buffers(self) -> Tensors | None:
        """The weighted mean of the peers' buffers of real numbers, by name; None where they are not shared or known."""
        known = {name for name, tensor in self.own_buffers.items() if tensor.is_floating_point()}
        shared = {n: t for n, t in self.after.items() if t.is_floating_point() and n not in self._parameters}
        if all(name in self.unchanged for name in shared) or (self.own_weight and known != shared.keys()):
            return None
        if not self.own_weight:
            return shared
        return {n: (t - self.own_weight * self.own_buffers[n]) / (1 - self.own_weight) for n, t in shared.items()}

    @cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(refuse_unfit(self.model, self.before))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return tuple(self.model["init_args"]["image_shape"])

    @property
    def num_classes(self) -> int:
        """Number of logits of the model."""
        return self.model["init_args"]["num_classes"]

    def save(self, stem: Path) -> None:
        """Save as `stem.safetensors` and `stem.json`, atomically, without pickle.

        Raises:
            StorageError: the disk is full, or the model was given as an object, of which a file can hold no name.
        """
        if isinstance(self.model["init_args"].get("module"), Prototype):
            raise StorageError(
                "This Observation's model was given as an object, so a file cannot name it. Describe it by its class: "
                "`model=WrappedClassifier(num_classes, image_shape, Net, arguments)`."
            )
        tensors = {
            f"{group}/{name}": tensor
            for group in ("before", "after", "own_update", "own_buffers")
            for name, tensor in getattr(self, group).items()
        }
        facts = {"version": VERSION, "round": self.round, "own_weight": self.own_weight, "model": self.model}
        save_record(stem, tensors, facts)

    @classmethod
    def load(cls, stem: Path) -> "Observation":
        """Load what `save` saved, in this or an earlier version.

        Raises:
            StorageError: a file is missing, cut short, changed, of a later version, or does not fit its model.
        """
        tensors, facts = load_record(stem, VERSION)
        groups: dict[str, dict[str, Tensor]] = {"before": {}, "after": {}, "own_update": {}, "own_buffers": {}}
        try:
            for name, tensor in tensors.items():
                group, _, parameter = name.partition("/")
                groups[group][parameter] = tensor
            observation = cls(
                round=facts["round"], **groups, own_weight=facts["own_weight"], model=dict(facts["model"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(
                f"'{stem}' is not an Observation of this program: {error!r}. Write it with `Observation.save`."
            ) from error
        for state in (observation.before, observation.after):
            refuse_unfit(observation.model, state)
        return observation


def _needed(image_shape: ImageShape | None, model: nn.Module) -> ImageShape:
    if image_shape is None:
        raise SettingError(
            f"{type(model).__name__} does not tell the shape of its images. Give `image_shape` as (channels, height, "
            "width), e.g. (3, 64, 64)."
        )
    return tuple(image_shape)


def describe_model(model: ImageClassifier) -> dict[str, Any]:
    """`class_path` and `init_args` from which `build_model` builds the same architecture again.

    Raises:
        SettingError: the model does not record its arguments.
    """
    arguments = {name: list(v) if isinstance(v, tuple) else v for name, v in dict(model.hparams).items()}
    name = type(model).__qualname__
    if not {"num_classes", "image_shape"} <= arguments.keys():
        raise SettingError(
            f"{name} does not record how it was built, so an Observation cannot name it. Call "
            "`self.save_hyperparameters()` in its `__init__(self, num_classes, image_shape, ...)`."
        )
    return {"class_path": f"{type(model).__module__}.{name}", "init_args": arguments}


def build_model(description: dict[str, Any], state: Tensors, shared: bool = False) -> ImageClassifier:
    """The described model with the given parameters and buffers, or with copies of them unless `shared`.

    Raises:
        StorageError: the class is not loaded or is no `ImageClassifier`, or the state does not fit it.
    """
    model_class = _model_class(description)
    refuse_unfit(description, state)
    with _Uninitialised():
        model = model_class(**description["init_args"])
    model.load_state_dict(state, assign=shared)
    return model.to(torch.get_default_dtype())  # the dtype of a new model, which shared tensors may not have


class _Uninitialised(TorchFunctionMode):
    """Leaves parameters as they were allocated, since a state is loaded: pages never written take no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        tensor = args[0] if args else named.get("tensor")
        if getattr(func, "__module__", None) == "torch.nn.init" and isinstance(tensor, nn.Parameter):
            return tensor
        return func(*args, **named)


def build_on_meta(description: dict[str, Any]) -> ImageClassifier:
    """The described architecture on the meta device: modules, names and shapes without memory.

    Raises:
        StorageError: the class is not loaded, is no `ImageClassifier`, or does not take these arguments.
    """
    model_class = _model_class(description)
    try:
        return copy.deepcopy(_built_on_meta(Arguments(model_class, description["init_args"])))
    except (KeyError, TypeError) as error:
        raise StorageError(
            f"{model_class.__name__} cannot be built from the Observation's `model` ({in_short(error)}). Its "
            "`init_args` are the arguments of the class's constructor, with `num_classes` and `image_shape`."
        ) from error


@lru_cache(maxsize=4)  # a deep model takes a second, and each observed round asks several times
def _built_on_meta(built_from: Arguments) -> ImageClassifier:
    return on_meta(built_from.build)


def on_meta(build: Callable[[], ImageClassifier]) -> ImageClassifier:
    """Build a model on the meta device, or move it there where its constructor looks at the values of tensors."""
    try:
        with torch.device("meta"):
            return build()
    except Exception:  # values are looked at, as ConvNeXt's rates by `.item()`; what else is wrong is raised here again
        with isolate_rng():
            return build().to("meta")


def refuse_unfit(description: dict[str, Any], state: Tensors) -> list[str]:
    """Check that the state has the names and shapes of the described model, without allocating the model.

    Returns:
        The names of the parameters (the other tensors are buffers).

    Raises:
        StorageError: the class is not loaded or is no `ImageClassifier`, or the state does not fit it.
    """
    model = build_on_meta(description)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    if expected != found:
        differing = sorted(set(expected.items()) ^ set(found.items()))
        raise StorageError(
            f"The observed tensors do not fit {type(model).__name__}: they differ at {differing[:4]}. Correct their "
            "names and shapes, or the Observation's `model`; a record of this program can be simulated again into "
            "another folder."
        )
    return list(parameters(model))


def _model_class(description: dict[str, Any]) -> type[ImageClassifier]:
    path = str(description.get("class_path", ""))
    module_name, _, class_name = path.rpartition(".")
    if module_name not in sys.modules:  # the file of an Observation must not choose what code is run
        raise StorageError(
            f"The Observation names the model class '{path}', but no module '{module_name}' is loaded, and a file may "
            "not load one. If you trust it, put it on the Python path and name it yourself: "
            f"`--federation.model {path}`, or `import {module_name}` in Python."
        )
    model_class = getattr(sys.modules[module_name], class_name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, ImageClassifier)):
        raise StorageError(
            f"'{path}' is not an `ImageClassifier`, so it cannot be simulated. Name the class of the global model in "
            "the Observation's `model`."
        )
    return model_class
