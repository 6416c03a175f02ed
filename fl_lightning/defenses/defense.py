"""Interface of the defences: what a client or the server adds to a round so that less leaks from it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fl_lightning.defenses.privacy import Privacy
from fl_lightning.models import ImageClassifier
from fl_lightning.seeds import seed_of
from fl_lightning.state_files import Tensors
from fl_lightning.storage import described, made_again


@dataclass
class Occasion:
    """What a defence has at one client, or at the server, in one round.

    Attributes:
        before: the global model's parameters before the round, by name.
        generator: of the defence's random numbers, on the CPU; its seed is of the round, the client and the place of
            the defence in the list.
        memory: what the defence keeps for the next round here, changed in place; it is saved with the federation.
    """

    before: Tensors
    generator: torch.Generator
    memory: Tensors

    def normal_like(self, tensor: Tensor) -> Tensor:
        """Standard normal numbers of a tensor's shape, dtype and device."""
        return torch.randn(tensor.shape, generator=self.generator, dtype=tensor.dtype).to(tensor.device)

    def uniform_like(self, tensor: Tensor) -> Tensor:
        """Numbers uniform in [0, 1), of a tensor's shape, dtype and device."""
        return torch.rand(tensor.shape, generator=self.generator, dtype=tensor.dtype).to(tensor.device)


class Defense:
    """A defence at the clients, at the server, or at either; a subclass is a frozen dataclass of its settings."""

    def privacy(self, rounds: int, local_epochs: int) -> Privacy | None:
        """The differential privacy that it guarantees after so many rounds; None if it guarantees none."""
        return None


class ClientDefense(Defense):
    """What every client does in its local training, or to its update before it is sent; the observing client too."""

    def refuse_beside(self, others: Sequence["ClientDefense"], class_weights: Sequence[float] | None) -> None:
        """Refuse a local training in which the defence does not do what it promises.

        Args:
            others: the other defences of the client.
            class_weights: of the loss; None for none.

        Raises:
            SettingError: they do not go together.
        """

    def start(self, model: ImageClassifier, occasion: Occasion) -> None:
        """Change the client's copy of the global model before it is trained; names of parameters stay."""

    def on_batch(
        self, model: ImageClassifier, images: Tensor, targets: Tensor, occasion: Occasion
    ) -> tuple[Tensor, Tensor]:
        """Change a batch before the forward pass.

        Args:
            model: the client's model.
            images: (N, C, H, W) in [0, 1].
            targets: (N,) labels, or (N, num_classes) probabilities where another defence made them.
            occasion: of this client and round.
        """
        return images, targets

    def on_gradient(self, model: ImageClassifier, images: Tensor, occasion: Occasion) -> None:
        """Change the gradients (`.grad`) of the model's parameters before a step.

        Args:
            model: the client's model.
            images: (N, C, H, W) the batch that they are of.
            occasion: of this client and round.
        """

    def on_update(self, update: Tensors, occasion: Occasion) -> Tensors:
        """The update that is sent, in place of the one that training gave; parameters before minus after, by name."""
        return update


class ServerDefense(Defense):
    """What the server does to the updates that arrive, or to their mean before its step."""

    def refuse_among(self, earlier: Sequence["ServerDefense"], later: Sequence["ServerDefense"]) -> None:
        """Refuse a list of the server's defences in which this one does not do what it promises.

        Args:
            earlier: those that are applied before it.
            later: those that are applied after it.

        Raises:
            SettingError: they do not go together.
        """

    def on_arrival(self, update: Tensors, num_examples: int, occasion: Occasion) -> Tensors:
        """What enters the mean of a client's update.

        Args:
            update: parameters before minus after, by name.
            num_examples: its weight.
            occasion: of the server in this round.
        """
        return update

    def on_mean(self, update: Tensors, occasion: Occasion) -> Tensors:
        """The update by which the global model is changed, in place of the clients' weighted mean."""
        return update


class UpdateDefense(ClientDefense, ServerDefense, ABC):
    """What changes an update: each client's before it is sent, or at the server the mean of all."""

    @abstractmethod
    def on_update(self, update: Tensors, occasion: Occasion) -> Tensors:
        """The changed update; parameters before minus after, by name."""

    def on_mean(self, update: Tensors, occasion: Occasion) -> Tensors:
        return self.on_update(update, occasion)


def refuse_unfit_order(defenses: Sequence[ServerDefense]) -> None:
    """Refuse a list of the server's defences in which one does not do what it promises.

    Raises:
        SettingError: they do not go together.
    """
    for place, defense in enumerate(defenses):
        defense.refuse_among(defenses[:place], defenses[place + 1 :])


def guaranteeing(defenses: Sequence[Defense]) -> list[str]:
    """Names of the classes of those defences that guarantee differential privacy."""
    return [type(defense).__name__ for defense in defenses if type(defense).privacy != Defense.privacy]


D = TypeVar("D", bound=Defense)


def occasions(defenses: Sequence[D], before: Tensors, seed: int, memory: Tensors) -> list[tuple[D, Occasion]]:
    """Each defence with its occasion.

    Args:
        defenses: of one client, or of the server, in the order in which they are applied.
        before: the global model's parameters, by name.
        seed: of the round and the client.
        memory: what all of them kept, see `memory_of`.
    """
    made = []
    for place, defense in enumerate(defenses):
        own = {name.removeprefix(f"{place}/"): t for name, t in memory.items() if name.startswith(f"{place}/")}
        made.append((defense, Occasion(before, torch.Generator().manual_seed(seed_of(seed, place)), own)))
    return made


def memory_of(applied: Sequence[tuple[Defense, Occasion]]) -> Tensors:
    """What the defences keep for the next round, each under its place in the list."""
    kept = enumerate(occasion.memory for _, occasion in applied)
    return {f"{place}/{name}": tensor for place, memory in kept for name, tensor in memory.items()}


def describe_defenses(defenses: Sequence[Defense]) -> list[dict[str, Any]]:
    """`class_path` and `init_args` of each, in JSON types."""
    return [described(defense) for defense in defenses]


def defenses_of(descriptions: Sequence[dict[str, Any]]) -> list[Defense]:
    """The defences that were described.

    Raises:
        StorageError: a class is not loaded, is no defence, or does not take these settings.
    """
    return [made_again(description, Defense, "defence") for description in descriptions]


def norm_of(update: Tensors) -> Tensor:
    """() Euclidean norm over all parameters."""
    return torch.stack([tensor.norm() for tensor in update.values()]).norm()


def rms_of(update: Tensors) -> Tensor:
    """() root mean square of all entries of all parameters."""
    return norm_of(update) / sum(tensor.numel() for tensor in update.values()) ** 0.5


def linear_layers(model: ImageClassifier) -> list[nn.Module]:
    """The linear layers of the model's head, in their order."""
    return [layer for _, layer in model.head_layers if isinstance(layer, nn.Linear)]
