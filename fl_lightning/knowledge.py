"""What the attacker is told, what it guesses, and what it must infer."""

import math
from dataclasses import asdict, dataclass
from typing import Literal

from fl_lightning.errors import AuditError
from fl_lightning.truth import Truth

Told = Literal["known"]
Inferred = Literal["inferred"]


class KnowledgeError(AuditError, ValueError):
    """The configured knowledge contradicts itself or cannot be had."""


@dataclass(frozen=True)
class Beliefs:
    """The values that an attack acts on, right or wrong.

    Attributes:
        client_lr: the peers' learning rate.
        server_lr: the server's learning rate.
        local_epochs: the peers' passes over their images.
        batch_size: the peers' batch size; None for full batch.
        momentum, weight_decay: of the peers' SGD; part of the task, so always told.
        num_clients: peers in the aggregate; None if unknown.
        num_images: images in the aggregate; None if it must be inferred.
        labels: one label an image: in the peers' order if labels are told, sorted if only their counts are; None if
            they must be inferred.
        client_sizes: images of each peer; told together with `num_clients`, split evenly if that is guessed.
    """

    client_lr: float
    server_lr: float
    local_epochs: int
    batch_size: int | None
    momentum: float
    weight_decay: float
    num_clients: int | None
    num_images: int | None
    labels: list[int] | None
    client_sizes: list[int] | None

    @property
    def local_steps(self) -> int:
        """SGD steps that a peer takes in a round; one an epoch where the peers' sizes are not believed."""
        if self.batch_size is None or not self.client_sizes:
            return self.local_epochs
        return self.local_epochs * math.ceil(sum(self.client_sizes) / len(self.client_sizes) / self.batch_size)

    @property
    def in_full_batches(self) -> bool:
        """Whether a peer's steps are believed to be taken on all of its images."""
        return self.local_steps == self.local_epochs

    @property
    def mean_rate(self) -> float:
        """Factor of an average step's gradient in a peer's update: `client_lr`, and what momentum adds to it.

        The gradient of step s of T is in the velocity of every later step: `sum_{k <= T - s} momentum^k`.
        """
        steps = self.local_steps
        summed = sum(self.momentum**later * (steps - later) for later in range(steps))
        return self.client_lr * summed / steps


@dataclass(frozen=True)
class Knowledge:
    """What the attacker knows of its peers: `known` is told the truth, a number is its guess, `inferred` is neither.

    Args:
        labels: whether it is told every image's label, peer by peer.
        label_counts: whether it is told how many images of each class there are (implied by known labels).
        num_images: how many images the peers hold together (implied by known labels or label counts).
        num_clients: how many peers took part, and how many images each of them holds.
        client_lr: the peers' learning rate. A guess is used in the simulation as well as in the scaling.
        server_lr: the server's learning rate.
        local_epochs: the peers' local epochs.
        batch_size: the peers' batch size; null guesses full batch.
    """

    labels: Told | Inferred = "known"
    label_counts: Told | Inferred = "known"
    num_images: Told | Inferred | int = "known"
    num_clients: Told | Inferred | int = "known"
    client_lr: Told | float = "known"
    server_lr: Told | float = "known"
    local_epochs: Told | int = "known"
    batch_size: Told | int | None = "known"

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int | float) and value <= 0:
                raise KnowledgeError(f"`knowledge.{name}` is guessed as {value}, but a guess must be positive.")
        if isinstance(self.num_images, int) and "known" in (self.labels, self.label_counts):
            raise KnowledgeError(
                f"`knowledge.num_images` is guessed as {self.num_images}, but known labels or label counts tell it. "
                "Set both `knowledge.labels` and `knowledge.label_counts` to `inferred`, or drop the guess."
            )

    @property
    def sources(self) -> dict[str, str]:
        """`known`, `guessed` or `inferred` for each item: the flags that go with every result."""
        flags = {k: v if v in ("known", "inferred") else "guessed" for k, v in asdict(self).items()}
        if self.labels == "known":
            flags["label_counts"] = "known"
        if flags["label_counts"] == "known":
            flags["num_images"] = "known"
        return flags

    def beliefs(self, truth: Truth | None) -> Beliefs:
        """What the attacker acts on.

        Args:
            truth: of the observed round, None where nobody knows it (an Observation from a real system).

        Raises:
            KnowledgeError: something is `known` but there is no truth to tell it.
        """
        told = [name for name, source in self.sources.items() if source == "known"]
        if truth is None and told:
            raise KnowledgeError(
                f"`knowledge` says that {', '.join(told)} {'is' if len(told) == 1 else 'are'} known, but no truth "
                "lies beside this Observation. Give the attacker's guesses instead, or `inferred`."
            )

        def value(name: str, true: float | None) -> float | None:
            own = getattr(self, name)
            return {"known": true, "inferred": None}.get(own, own)

        training = truth.training if truth else None
        labels = truth.labels.tolist() if truth else []
        sizes = truth.client_sizes if truth else []
        num_images = len(labels) if self.sources["num_images"] == "known" else value("num_images", None)
        num_clients = value("num_clients", len(sizes))
        if self.num_clients != "known":
            sizes = _split_evenly(num_images, num_clients) if num_images and num_clients else None
        return Beliefs(
            client_lr=value("client_lr", training and training.lr),
            server_lr=value("server_lr", truth and truth.server_lr),
            local_epochs=value("local_epochs", training and training.local_epochs),
            batch_size=value("batch_size", training and training.batch_size),
            momentum=training.momentum if training else 0.0,
            weight_decay=training.weight_decay if training else 0.0,
            num_clients=num_clients,
            num_images=num_images,
            labels=labels if self.labels == "known" else sorted(labels) if self.label_counts == "known" else None,
            client_sizes=sizes,
        )


def _split_evenly(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]
