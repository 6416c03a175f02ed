"""What the attacker never sees: the peers' images, and the settings as they really were. For evaluation only."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fl_lightning.client import LocalTraining
from fl_lightning.storage import load_record, save_record

VERSION = 1


@dataclass(frozen=True)
class Truth:
    """The secrets of one round. No function of an attack takes one; `Knowledge` decides what an attacker is told.

    Attributes:
        pixels: (M, C, H, W) uint8, the peers' images, peer by peer.
        labels: (M,) long.
        clients: (M,) long, the peer that holds each image.
        training: the peers' local training.
        server_lr: the server's learning rate.
        class_names: names of the classes.
        imagenet_labels: whether labels are the standard ImageNet class index.
    """

    pixels: Tensor
    labels: Tensor
    clients: Tensor
    training: LocalTraining
    server_lr: float
    class_names: list[str]
    imagenet_labels: bool

    @property
    def images(self) -> Tensor:
        """(M, C, H, W) float32 in [0, 1]."""
        return self.pixels / 255

    @property
    def client_sizes(self) -> list[int]:
        """Images of each peer that took part, in the order of `labels`."""
        return self.clients.unique_consecutive(return_counts=True)[1].tolist()

    @classmethod
    def union(cls, rounds: Sequence["Truth"]) -> "Truth":
        """All peers' images of several rounds of one federation, peer by peer; a peer holds the same in every round."""
        clients = torch.cat([truth.clients for truth in rounds]).unique().tolist()
        first = [next(truth for truth in rounds if client in truth.clients) for client in clients]
        held = [truth.clients == client for truth, client in zip(first, clients, strict=True)]
        names = ("pixels", "labels", "clients")
        joined = {
            name: torch.cat([getattr(t, name)[own] for t, own in zip(first, held, strict=True)]) for name in names
        }
        return replace(rounds[-1], **joined)

    def save(self, stem: Path) -> None:
        """Save as `stem.safetensors` and `stem.json`."""
        tensors = {"pixels": self.pixels, "labels": self.labels, "clients": self.clients}
        facts: dict[str, Any] = {
            "version": VERSION,
            "training": asdict(self.training),
            "server_lr": self.server_lr,
            "class_names": self.class_names,
            "imagenet_labels": self.imagenet_labels,
        }
        save_record(stem, tensors, facts)

    @classmethod
    def load(cls, stem: Path) -> "Truth":
        """Load what `save` saved.

        Raises:
            StorageError: a file is missing, cut short, changed, or of another version.
        """
        tensors, facts = load_record(stem, VERSION)
        return cls(
            **tensors,
            training=LocalTraining(**facts["training"]),
            server_lr=facts["server_lr"],
            class_names=facts["class_names"],
            imagenet_labels=facts["imagenet_labels"],
        )
