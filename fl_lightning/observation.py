"""What one curious client saw of a round."""

import importlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fl_lightning.client import Tensors, parameters
from fl_lightning.errors import SettingError
from fl_lightning.knowledge import Beliefs
from fl_lightning.models import ImageClassifier
from fl_lightning.storage import StorageError, load_record, save_record

VERSION = 1


@dataclass(frozen=True)
class Observation:
    """One round from the seat of an honest-but-curious client: everything that an attack may use.

    Attributes:
        round: its number, from 0.
        before: the global model `w_t`, parameters and buffers by name.
        after: the global model `w_{t+1}`.
        own_update: the attacker's own update `u_A` (before minus after), empty if it trained on nothing.
        own_weight: its aggregation weight `p_A`, 0 if it trained on nothing.
        model: `class_path` and `init_args` of the model, which every client knows.
        beliefs: what the attacker acts on, see `Knowledge`.
        sources: whether each belief was known, guessed or is to be inferred.
    """

    round: int
    before: Tensors
    after: Tensors
    own_update: Tensors
    own_weight: float
    model: dict[str, Any]
    beliefs: Beliefs
    sources: dict[str, str]

    def build_model(self, shared: bool = False) -> ImageClassifier:
        """The global model `w_t`, ready to run.

        Args:
            shared: take the very tensors of `before`, to save memory; they must then not be changed in place.

        Raises:
            StorageError: the model class is unknown, or does not have the observed tensors' names and shapes.
        """
        return build_model(self.model, self.before, shared)

    def aggregated_update(self) -> Tensors:
        """`u = (w_t - w_{t+1}) / server_lr`: the weighted mean of all clients' updates, by parameter name."""
        return {
            name: (self.before[name] - self.after[name]).div_(self.beliefs.server_lr)
            for name in refuse_unfit(self.model, self.before)
        }

    def peers_update(self) -> Tensors:
        """`u_peers = (u - p_A u_A) / (1 - p_A)`: the weighted mean of the peers' updates, by parameter name."""
        update = self.aggregated_update()  # a head has 100 MB and more, so it becomes the peers' in place
        for name, own in self.own_update.items():
            update[name].sub_(own, alpha=self.own_weight)
        return {name: mean.div_(1 - self.own_weight) for name, mean in update.items()}

    def without_weight_decay(self, update: Tensors) -> Tensors:
        """What the loss's gradients alone added up to in an update, to first order in the believed weight decay."""
        beliefs = self.beliefs
        if not beliefs.weight_decay:
            return update
        steps = beliefs.local_steps
        decay = beliefs.mean_rate * steps * beliefs.weight_decay
        half_way = (steps - 1) / (2 * steps)
        return {name: tensor - decay * (self.before[name] - half_way * tensor) for name, tensor in update.items()}

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
        facts = {
            "version": VERSION,
            "round": self.round,
            "own_weight": self.own_weight,
            "model": self.model,
            "beliefs": asdict(self.beliefs),
            "sources": self.sources,
        }
        save_record(stem, tensors, facts)

    @classmethod
    def load(cls, stem: Path) -> "Observation":
        """Load what `save` saved.

        Raises:
            StorageError: a file is missing, cut short, changed, of another version, or does not fit its model.
        """
        tensors, facts = load_record(stem, VERSION)
        groups: dict[str, dict[str, Tensor]] = {"before": {}, "after": {}, "own_update": {}}
        try:
            for name, tensor in tensors.items():
                group, _, parameter = name.partition("/")
                groups[group][parameter] = tensor
            observation = cls(
                round=facts["round"],
                **groups,
                own_weight=facts["own_weight"],
                model=facts["model"],
                beliefs=Beliefs(**facts["beliefs"]),
                sources=facts["sources"],
            )
        except (KeyError, TypeError) as error:
            raise StorageError(
                f"'{stem}' is not an Observation of this program: {error}. Write it with `Observation.save`."
            ) from error
        for state in (observation.before, observation.after):
            refuse_unfit(observation.model, state)
        return observation


def describe_model(model: ImageClassifier) -> dict[str, Any]:
    """`class_path` and `init_args` by which `build_model` makes the same architecture again.

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
        StorageError: the class cannot be imported or is no `ImageClassifier`, or the state does not fit it.
    """
    model_class = _model_class(description)
    refuse_unfit(description, state)
    model = model_class(**description["init_args"])
    model.load_state_dict(state, assign=shared)
    return model.to(torch.get_default_dtype())  # in which a model is made, and tensors that it takes over may not be


def refuse_unfit(description: dict[str, Any], state: Tensors) -> list[str]:
    """Check that the state has the described model's names and shapes, without its memory.

    Returns:
        The names of the parameters (the other tensors are buffers).

    Raises:
        StorageError: the class cannot be imported or is no `ImageClassifier`, or the state does not fit it.
    """
    model_class = _model_class(description)
    with torch.device("meta"):
        model = model_class(**description["init_args"])
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    if expected != found:
        differing = sorted(set(expected.items()) ^ set(found.items()))
        raise StorageError(
            f"The observed tensors do not fit {model_class.__name__}: they differ at {differing[:6]}. "
            "This Observation belongs to another model; run the federation again into another folder."
        )
    return list(parameters(model))


def _model_class(description: dict[str, Any]) -> type[ImageClassifier]:
    module_name, _, class_name = str(description.get("class_path", "")).rpartition(".")
    try:
        model_class = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise StorageError(
            f"The model class '{description.get('class_path')}' cannot be imported ({error}). "
            "Put it on the Python path, or run the federation again."
        ) from error
    if not (isinstance(model_class, type) and issubclass(model_class, ImageClassifier)):
        raise StorageError(f"'{description['class_path']}' is not an `ImageClassifier`, so it cannot be simulated.")
    return model_class
