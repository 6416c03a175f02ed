"""One client's local training."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from fl_lightning.allocation import has_large, release_freed_memory, release_pages
from fl_lightning.data import ImageSet
from fl_lightning.defenses import ClientDefense, defenses_of, describe_defenses, memory_of, occasions
from fl_lightning.defenses.defense import Occasion
from fl_lightning.errors import SettingError, counted, non_negative, positive
from fl_lightning.loss import CrossEntropy
from fl_lightning.models import ImageClassifier
from fl_lightning.state_files import Tensors


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains: SGD or Adam on the cross entropy of its own images.

    Args:
        lr: learning rate.
        local_epochs: passes over the client's images in a round.
        batch_size: images in an SGD step; null for full batches, all of the client's images.
        momentum: of SGD; the velocity starts at zero in every round.
        weight_decay: of SGD, or of Adam.
        optimizer: `SGD`, or `Adam` with torch's betas and epsilon, whose state starts anew in every round.
        label_smoothing: of the cross entropy, in [0, 1).
        class_weights: of the cross entropy, one positive number for each class; null for none.
        defenses: what the client does so that less leaks, in this order; `defenses+:` in a file adds to the list.
    """

    lr: float = 0.003
    local_epochs: int = 3
    batch_size: int | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    optimizer: Literal["SGD", "Adam"] = "SGD"
    label_smoothing: float = 0.0
    class_weights: list[float] | None = None
    defenses: list[ClientDefense] = field(default_factory=list)

    def __post_init__(self) -> None:
        counts = self.local_epochs >= 1 and (self.batch_size is None or self.batch_size >= 1)
        if self.optimizer == "Adam" and self.momentum:
            raise SettingError(
                f"`federation.client.momentum` is {self.momentum}, but Adam has a momentum of its own. Set it to 0, or "
                "choose `federation.client.optimizer: SGD`."
            )
        if not (positive(self.lr) and counts and 0 <= self.momentum < 1 and non_negative(self.weight_decay)):
            raise SettingError(
                "`federation.client` needs lr > 0, local_epochs >= 1, batch_size >= 1 or null, momentum in [0, 1) and "
                f"weight_decay >= 0, but got lr={self.lr}, local_epochs={self.local_epochs}, "
                f"batch_size={self.batch_size}, momentum={self.momentum} and weight_decay={self.weight_decay}."
            )
        _ = self.loss  # which refuses its own numbers
        for place, defense in enumerate(self.defenses):
            defense.refuse_beside(self.defenses[:place] + self.defenses[place + 1 :], self.class_weights)

    @property
    def loss(self) -> CrossEntropy:
        """What is minimised."""
        return CrossEntropy(self.label_smoothing, None if self.class_weights is None else tuple(self.class_weights))

    def describe(self) -> dict[str, Any]:
        """The settings in JSON types, for `restored`."""
        settings = {item.name: getattr(self, item.name) for item in fields(self)}
        return settings | {"defenses": describe_defenses(self.defenses)}

    @classmethod
    def restored(cls, description: dict[str, Any]) -> "LocalTraining":
        """The settings that were described.

        Raises:
            StorageError: a defence's class is not loaded, or has other settings.
        """
        return cls(**{**description, "defenses": defenses_of(description.get("defenses", []))})


class ClientModule(LightningModule):
    """Local training of the global model on one client's images: ClientUpdate of FedAvg (McMahan et al. 2017).

    Args:
        model: the client's own copy of the global model.
        training: the settings of its optimiser.
        defenses: of the client, each with its occasion.

    Raises:
        SettingError: while training, a batch is too small for the model.
    """

    def __init__(
        self,
        model: ImageClassifier,
        training: LocalTraining,
        defenses: list[tuple[ClientDefense, Occasion]],
    ) -> None:
        super().__init__()
        self.model = model
        self.training_settings = training
        self.defenses = defenses

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        for defense, occasion in self.defenses:
            images, targets = defense.on_batch(self.model, images, targets, occasion)
        self.images = images
        try:
            logits = self.model(images)
        except ValueError as error:  # BatchNorm, whose statistics need more than one value
            raise SettingError(
                f"{type(self.model).__name__} cannot train on a batch of {counted(len(images), 'image')} of shape "
                f"{tuple(images.shape[1:])} ({error}). Give the clients more images (`data.images_per_client`), larger "
                "ones (`data.image_size`), or another model."
            ) from error
        return self.training_settings.loss(logits, targets)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for defense, occasion in self.defenses:
            defense.on_gradient(self.model, self.images, occasion)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        settings = self.training_settings
        if settings.optimizer == "Adam":
            return torch.optim.Adam(self.parameters(), settings.lr, weight_decay=settings.weight_decay)
        return torch.optim.SGD(
            self.parameters(), settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )


@dataclass(frozen=True)
class ClientUpdate:
    """What a client sends to the server.

    Attributes:
        update: parameters before minus after local training, so it points like a gradient; without frozen ones.
        buffers: the model's buffers after local training (BatchNorm's running statistics).
        num_examples: number of images that the client trained on, its weight in the aggregate.
        memory: what its defences keep for its next round; it stays with the client.
    """

    update: Tensors
    buffers: Tensors
    num_examples: int
    memory: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class ClientTask:
    """What one client does in one round.

    Attributes:
        model: the global model `w_t` that the server sent; it is not modified. Of its parameters, those that require
            gradients are trained, and its frozen BatchNorm layers are in eval mode.
        images: the client's private images.
        seed: of the order of mini-batches, of random layers and of defences.
        memory: what the client's defences kept of its former round.
        client: its number in the federation.
        round: of the federation, from 0.
        own_buffers: BatchNorm's running statistics that the client keeps to itself, empty before its first round; None
            where they are shared as the model's other tensors are.
        in_file: whether the model's tensors are a mapped file, whose pages need not stay in memory.
    """

    model: ImageClassifier
    images: ImageSet
    seed: int
    memory: Tensors = field(default_factory=dict)
    client: int = 0
    round: int = 0
    own_buffers: Tensors | None = None
    in_file: bool = False


def local_update(task: ClientTask, training: LocalTraining, accelerator: str = "cpu") -> ClientUpdate:
    """Train a copy of the global model on one client's images; the same arguments give the same update.

    Args:
        task: the client's model, images and seed.
        training: the settings of the optimiser.
        accelerator: where Lightning trains (`cpu`, `gpu`, `auto`).
    """
    large = has_large(task.model.parameters())
    if large:
        release_freed_memory()  # new tensors do not fit between what is left of the last client's
    model = copy.deepcopy(task.model)
    if task.in_file:
        release_pages(task.model.state_dict().values())
    model.load_state_dict(task.own_buffers or {}, strict=False)
    defenses = occasions(training.defenses, trained_parameters(task.model), task.seed, task.memory)
    client = ClientModule(model, training, defenses)
    with isolate_rng(), quiet():
        torch.manual_seed(task.seed)
        for defense, occasion in defenses:
            defense.start(model, occasion)
        trainer = silent_trainer(
            max_epochs=training.local_epochs, accelerator=accelerator, use_distributed_sampler=False
        )
        generator = torch.Generator().manual_seed(task.seed)
        trainer.fit(client, task.images.dataloader(training.batch_size, shuffle=True, generator=generator))
    after = parameters(model.cpu())
    client.model = client.images = None  # a Trainer refers to itself, and would keep both until the next collection
    trainer.strategy.optimizers = []
    model.zero_grad()
    if large:
        release_freed_memory()  # gradients and activations, beside which the global model would be read again
    update = trained_parameters(task.model)
    update = {name: torch.sub(before, after[name], out=after[name]) for name, before in update.items()}  # of 100 MB
    for defense, occasion in defenses:
        update = defense.on_update(update, occasion)
    return ClientUpdate(update, buffers(model), len(task.images), memory_of(defenses))


def parameters(model: torch.nn.Module) -> Tensors:
    """The model's parameters by name, detached."""
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def trained_parameters(model: torch.nn.Module) -> Tensors:
    """The model's parameters that are not frozen, by name, detached."""
    return {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}


def buffers(model: torch.nn.Module) -> Tensors:
    """The model's buffers in its state dict (BatchNorm's, but not the normalisation constants), by name."""
    names = model.state_dict().keys()
    return {name: tensor for name, tensor in model.named_buffers() if name in names}


def silent_trainer(
    accelerator: str, max_steps: int = -1, max_epochs: int | None = None, use_distributed_sampler: bool = True
) -> Trainer:
    """A Trainer on one device that neither writes nor prints; arguments as of Lightning's."""
    return Trainer(
        max_steps=max_steps,
        max_epochs=max_epochs,
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=use_distributed_sampler,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's notes on hardware, loggers and frozen layers, which every client would repeat."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*in eval mode at the start of training")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
