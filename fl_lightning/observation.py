"""What one client of a federation received in one round."""

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from fl_lightning.client import Tensors, parameters
from fl_lightning.errors import SettingError
from fl_lightning.models import ImageClassifier
from fl_lightning.storage import StorageError, load_record, save_record

VERSION = 2
"""Of the files. Version 1 also held what the attacker assumed of its peers, which is now the attack's own setting."""


@dataclass(frozen=True)
class Observation:
    """What crossed the wire in one round, seen from the seat of one client, and nothing else.

    An *update* is parameters before minus after, so it points like a gradient.

    Attributes:
        round: number of the round, from 0.
        before: the global model `w_t`, parameters and buffers by name.
        after: the global model `w_{t+1}`.
        own_update: the update `u_A` of the observing client, empty if it did not train.
        own_weight: its aggregation weight `p_A` in [0, 1), 0 if it did not train.
        model: `class_path` and `init_args` of the architecture, which every client knows.
    """

    round: int
    before: Tensors
    after: Tensors
    own_update: Tensors
    own_weight: float
    model: dict[str, Any]

    def build_model(self, shared: bool = False) -> ImageClassifier:
        """The global model `w_t`, ready to run.

        Args:
            shared: use the tensors of `before` themselves, to save memory; they must then not be changed in place.

        Raises:
            StorageError: the model class is unknown, or does not have the observed tensors' names and shapes.
        """
        return build_model(self.model, self.before, shared)

    def aggregated_update(self, server_lr: float) -> Tensors:
        """`u = (w_t - w_{t+1}) / server_lr`: the weighted mean of all clients' updates, by parameter name."""
        return {
            name: (self.before[name] - self.after[name]).div_(server_lr)
            for name in refuse_unfit(self.model, self.before)
        }

    def peers_update(self, server_lr: float) -> Tensors:
        """`u_peers = (u - p_A u_A) / (1 - p_A)`: the weighted mean of the peers' updates, by parameter name."""
        update = self.aggregated_update(server_lr)  # a head has 100 MB and more: computed in place
        for name, own in self.own_update.items():
            update[name].sub_(own, alpha=self.own_weight)
        return {name: mean.div_(1 - self.own_weight) for name, mean in update.items()}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return tuple(self.model["init_args"]["image_shape"])

    @property
    def num_classes(self) -> int:
        """Number of logits of the model."""
        return self.model["init_args"]["num_classes"]

    def save(self, stem: Path) -> None:
        """Save as `stem.safetensors` and `stem.json`, atomically, without pickle."""
        tensors = {
            f"{group}/{name}": tensor
            for group in ("before", "after", "own_update")
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
        groups: dict[str, dict[str, Tensor]] = {"before": {}, "after": {}, "own_update": {}}
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
    model = model_class(**description["init_args"])
    model.load_state_dict(state, assign=shared)
    return model.to(torch.get_default_dtype())  # the dtype of a new model, which shared tensors may not have


def build_on_meta(description: dict[str, Any]) -> ImageClassifier:
    """The described architecture on the meta device: modules, names and shapes without memory.

    Raises:
        StorageError: the class is not loaded, is no `ImageClassifier`, or does not take these arguments.
    """
    model_class = _model_class(description)
    try:
        return copy.deepcopy(_built_on_meta(model_class, json.dumps(description["init_args"])))
    except (KeyError, TypeError) as error:
        raise StorageError(
            f"{model_class.__name__} cannot be built from the Observation's `model`: {error}. Its `init_args` are the "
            "arguments of the class's constructor, with `num_classes` and `image_shape`."
        ) from error


@lru_cache(maxsize=4)  # a deep model takes a second, and each observed round asks several times
def _built_on_meta(model_class: type[ImageClassifier], arguments: str) -> ImageClassifier:
    return on_meta(lambda: model_class(**json.loads(arguments)))


def on_meta(build: Callable[[], ImageClassifier]) -> ImageClassifier:
    """Build a model on the meta device, or move it there where its constructor looks at the values of tensors."""
    try:
        with torch.device("meta"):
            return build()
    except NotImplementedError:  # RegNet's and timm's widths and rates, computed by torch
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
