"""The values that an attack acts on: told, guessed, or still to be inferred."""

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from fl_lightning.client import Tensors
from fl_lightning.data.partition import even_sizes
from fl_lightning.defenses import ClientDefense, ServerDefense
from fl_lightning.loss import CrossEntropy
from fl_lightning.server_optimizers import FedAvg, ServerOptimizer


def half_way(steps: int) -> float:
    """Fraction of the peers' update after which their mean model is, on average over `steps` local steps.

    Step s of T begins after (s - 1) / T of the update; the mean over the steps is (T - 1) / (2 T). To second order in
    the learning rate, the mean gradient of the steps is the gradient at that model.
    """
    return (steps - 1) / (2 * steps)


@dataclass(frozen=True)
class Assumptions:
    """How the peers trained and what they hold, as an attack takes it to be, right or wrong.

    Attributes:
        client_lr: the peers' learning rate.
        local_epochs: the peers' passes over their images in a round.
        batch_size: the peers' mini-batch size; None for full batches.
        server_lr: the server's learning rate.
        server: the server's optimiser.
        momentum: of the peers' SGD.
        weight_decay: of the peers' SGD.
        label_smoothing: of the peers' cross entropy.
        class_weights: of the peers' cross entropy, one for each class; None for none.
        num_clients: peers in the aggregate; None if unknown.
        num_images: images in the aggregate; None if it must be inferred.
        labels: one label an image, ordered by peer if labels are told, sorted if only their counts are; None if they
            must be inferred.
        client_sizes: images of each peer; told together with `num_clients`, split evenly if that is guessed.
        optimizer: of the peers; of Adam, the closed form reads a single step, and no attack simulates it.
        defenses: of the peers, in the order in which they apply them; empty where there are none or they are unknown.
        server_defenses: of the server, likewise.
        sources: `known`, `guessed`, `inferred` or `unknown` for each item of `Knowledge`; written into every result.
            What is missing there is guessed, or inferred where it is None.
    """

    client_lr: float
    local_epochs: int
    batch_size: int | None = None
    server_lr: float = 1.0
    server: ServerOptimizer = field(default_factory=FedAvg)
    momentum: float = 0.0
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    class_weights: list[float] | None = None
    num_clients: int | None = None
    num_images: int | None = None
    labels: list[int] | None = None
    client_sizes: list[int] | None = None
    optimizer: Literal["SGD", "Adam"] = "SGD"
    defenses: tuple[ClientDefense, ...] = ()
    server_defenses: tuple[ServerDefense, ...] = ()
    sources: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for item in fields(self):  # where nobody says otherwise, what is here is a guess
            if item.name not in ("client_sizes", "server_defenses", "sources"):
                guessed = getattr(self, item.name) is not None or item.name in ("batch_size", "class_weights")
                self.sources.setdefault(item.name, "guessed" if guessed else "inferred")

    def introduction(self) -> str:
        """What the attacker is told, in a line, and what no attack makes use of."""
        told = [name for name, source in self.sources.items() if source == "known"]
        rest = [f"{name} ({source})" for name, source in self.sources.items() if source != "known"]
        lines = [f"Told to the attacker: {', '.join(told) or 'nothing'}; not told: {', '.join(rest) or 'nothing'}."]
        if self.optimizer != "SGD":
            lines.append(
                f"The peers are taken to train by {self.optimizer}, of which FeatureInversion reads a single local "
                "step in full batches, without weight decay or defences. It else attacks as if they trained by SGD, as "
                "every other attack does, and mostly fails."
            )
        return "\n".join(lines)

    @property
    def loss(self) -> CrossEntropy:
        """What the peers minimise."""
        return CrossEntropy(self.label_smoothing, None if self.class_weights is None else tuple(self.class_weights))

    @property
    def local_steps(self) -> int:
        """SGD steps that a peer takes in a round; one an epoch where the peers' sizes are unknown."""
        if self.batch_size is None or not self.client_sizes:
            return self.local_epochs
        return self.local_epochs * math.ceil(sum(self.client_sizes) / len(self.client_sizes) / self.batch_size)

    @property
    def in_full_batches(self) -> bool:
        """Whether each local step is known to use all of a peer's images."""
        return self.batch_size is None or (bool(self.client_sizes) and self.local_steps == self.local_epochs)

    @property
    def mean_rate(self) -> float:
        """Mean factor of a step's gradient in a peer's update: `client_lr`, and what momentum adds to it.

        The gradient of step s of T is in the velocity of every later step: `sum_{k <= T - s} momentum^k`.
        """
        steps = self.local_steps
        summed = sum(self.momentum**later * (steps - later) for later in range(steps))
        return self.client_lr * summed / steps

    def without_weight_decay(self, update: Tensors, before: Tensors) -> Tensors:
        """The part of an update that the loss's gradients caused, to first order in the weight decay.

        Args:
            update: parameters before minus after, by name.
            before: parameters before the round, by name.
        """
        if not self.weight_decay:
            return update
        decay = self.mean_rate * self.local_steps * self.weight_decay
        elapsed = half_way(self.local_steps)
        return {
            name: tensor - decay * (before[name] - elapsed * tensor) if tensor.any() else tensor  # frozen or not sent
            for name, tensor in update.items()
        }


def split_evenly(num_images: int | None, num_clients: int | None) -> list[int] | None:
    """Sizes of equally large peers; None where a number is unknown."""
    return even_sizes(num_images, num_clients) if num_images and num_clients else None
