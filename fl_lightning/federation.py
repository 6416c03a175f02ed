"""The federation: rounds of client sampling, local training and aggregation (FedAvg)."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from fl_lightning.aggregation import aggregate, server_step
from fl_lightning.client import ClientTask, ClientUpdate, LocalTraining, Tensors, buffers, parameters
from fl_lightning.data import FederatedData
from fl_lightning.engines import Engine, InProcess
from fl_lightning.errors import SettingError, positive
from fl_lightning.models import ClassifierFactory, ImageClassifier, LeNet5
from fl_lightning.observation import Observation, describe_model
from fl_lightning.record import Record
from fl_lightning.seeds import seed_of
from fl_lightning.storage import load_checkpoint, save_checkpoint
from fl_lightning.truth import Truth


class Federation:
    """A server and its clients: FedAvg (McMahan et al. 2017, Algorithm 1).

    With `client.local_epochs: 1` and full batches it is FedSGD. The last client is the observer: it trains like the
    others, and what it receives in the observed rounds is written to the record.

    Args:
        model: the global model's class, called with the number of classes and the shape of an image.
        client: the clients' local training.
        rounds: number of communication rounds.
        clients_per_round: clients sampled in each round; null for all.
        server_lr: learning rate of the server's step `w_{t+1} = w_t - server_lr * u`, `u` the mean update.
        share_buffers: whether BatchNorm's running statistics are averaged with the model, or stay with each client.
        observed_rounds: rounds, from 0, that are written to the record; null for the last.
        engine: where clients run.
        accelerator: what clients train on (`cpu`, `gpu`, `auto`).
        seed: of the model's initial weights, the sampling of clients and the order of mini-batches.
    """

    def __init__(
        self,
        model: ClassifierFactory = LeNet5,
        client: LocalTraining = LocalTraining(),  # noqa: B008 - frozen
        rounds: int = 1,
        clients_per_round: int | None = None,
        server_lr: float = 1.0,
        share_buffers: bool = True,
        observed_rounds: list[int] | None = None,
        engine: Engine | None = None,
        accelerator: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.observed_rounds = [rounds - 1] if observed_rounds is None else sorted(set(observed_rounds))
        if rounds < 1 or not positive(server_lr) or (clients_per_round is not None and clients_per_round < 1):
            raise SettingError(
                "`federation` needs rounds >= 1, server_lr > 0 and clients_per_round >= 1 or null, but got "
                f"rounds={rounds}, server_lr={server_lr}, clients_per_round={clients_per_round}."
            )
        if not set(self.observed_rounds) <= set(range(rounds)):
            raise SettingError(
                f"`federation.observed_rounds` is {observed_rounds}, but rounds go from 0 to {rounds - 1}. "
                "Name rounds among them, or raise `federation.rounds`."
            )
        self.model = model
        self.client = client
        self.rounds = rounds
        self.clients_per_round = clients_per_round
        self.server_lr = server_lr
        self.share_buffers = share_buffers
        self.engine = engine or InProcess()
        self.accelerator = accelerator
        self.seed = seed

    def initial_model(self, data: FederatedData) -> ImageClassifier:
        """The global model `w_0` for this data (after `data.setup()`)."""
        with isolate_rng():
            torch.manual_seed(self.seed)
            return self.model(data.num_classes, data.image_shape)

    def settings(self, data: FederatedData) -> dict[str, Any]:
        """Everything that determines the federation's course, as plain JSON types."""
        with torch.device("meta"):
            model = describe_model(self.model(data.num_classes, data.image_shape))
        return {
            "model": model,
            "client": asdict(self.client),
            "rounds": self.rounds,
            "clients_per_round": self.clients_per_round,
            "server_lr": self.server_lr,
            "share_buffers": self.share_buffers,
            "observed_rounds": self.observed_rounds,
            "seed": self.seed,
            "data": data.describe() | {"content": data.content},
        }

    def introduction(self, data: FederatedData) -> str:
        """The federation in one sentence."""
        training = self.client
        batches = "full batches" if training.batch_size is None else f"batches of {training.batch_size}"
        model = self.settings(data)["model"]["class_path"].rpartition(".")[2]
        return (
            f"Federation: {model}, {data.num_classes} classes; {data.num_clients} clients with "
            f"{sum(len(images) for images in data.clients)} images of {'x'.join(map(str, data.image_shape))} "
            f"({type(data).__name__}); {self.rounds} round(s) of {training.local_epochs} local epoch(s), {batches}, "
            f"lr {training.lr:g}."
        )

    def run(self, data: FederatedData, directory: Path) -> None:
        """Run all rounds, or those that are missing, and leave a `Record` in `directory`.

        The global model is saved after every round, so an interrupted run continues with the next round and ends
        with the same weights as an uninterrupted one.

        Raises:
            RecordError: the directory holds the record of a federation with other settings.
            StorageError: the disk is full.
        """
        settings = json.loads(json.dumps(self.settings(data)))
        record = Record(directory)
        record.claim(settings)
        model = self.initial_model(data)
        kept_buffers: dict[str, Tensors] = {}  # by client, where they are not shared
        start = 0
        if record.checkpoint.exists():
            state = load_checkpoint(record.checkpoint)
            model.load_state_dict(state["model"])
            start, kept_buffers = state["rounds_done"], state["kept_buffers"]
        logger = TensorBoardLogger(directory, name="", version="tensorboard")
        with Progress() as progress:
            task = progress.add_task("Federation, rounds", total=self.rounds, completed=start)
            for round_ in range(start, self.rounds):
                model = self._round(round_, model, data, kept_buffers, record)
                save_checkpoint(
                    record.checkpoint,
                    {"rounds_done": round_ + 1, "model": model.state_dict(), "kept_buffers": kept_buffers},
                )
                scores = self._evaluate(model, data)
                logger.log_metrics(scores, step=round_ + 1)
                logger.save()
                shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in scores.items())
                progress.update(task, advance=1, description=f"Federation, rounds ({shown})")
        logger.finalize("success")

    def _round(
        self,
        round_: int,
        model: ImageClassifier,
        data: FederatedData,
        kept_buffers: dict[str, Tensors],
        record: Record,
    ) -> ImageClassifier:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        participants = self._sample(round_, data)
        own = None

        def tasks() -> Iterator[ClientTask]:
            for client in participants:
                model.load_state_dict(kept_buffers.get(str(client), {}), strict=False)
                yield ClientTask(model, data.clients[client], seed_of(self.seed, round_, client))

        def updates() -> Iterator[ClientUpdate]:
            nonlocal own
            for client, result in zip(
                participants, self.engine.train(tasks(), self.client, self.accelerator), strict=True
            ):
                if not self.share_buffers:
                    kept_buffers[str(client)] = result.buffers
                if client == data.attacker:
                    own = result
                yield result

        mean = aggregate(updates())
        parameters_after = server_step(parameters(model), mean.update, self.server_lr)
        model.load_state_dict({**before, **parameters_after, **(mean.buffers if self.share_buffers else {})})
        after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if round_ in self.observed_rounds:
            observation = Observation(
                round=round_,
                before=before,
                after=after,
                own_update=own.update if own else {},
                own_weight=own.num_examples / mean.num_examples if own else 0.0,
                model=describe_model(model),
            )
            self.truth(round_, data).save(record.truth(round_))
            observation.save(record.observation(round_))
        return model

    def _sample(self, round_: int, data: FederatedData) -> list[int]:
        """The clients of a round, in ascending order; those without images never take part."""
        able = [client for client, images in enumerate(data.clients) if len(images)]
        if self.clients_per_round is None:
            return able
        if self.clients_per_round > len(able):
            raise SettingError(
                f"`federation.clients_per_round` is {self.clients_per_round}, but only {len(able)} clients hold "
                "images. Lower it, or raise `data.num_clients`."
            )
        generator = torch.Generator().manual_seed(seed_of(self.seed, round_))
        chosen = torch.randperm(len(able), generator=generator)[: self.clients_per_round]
        return sorted(able[i] for i in chosen.tolist())

    def truth(self, round_: int, data: FederatedData) -> Truth:
        """The ground truth of a round, which is known before the round is run.

        Raises:
            SettingError: no peer of the observing client takes part in the round.
        """
        peers = [client for client in self._sample(round_, data) if client != data.attacker]
        sets = [data.clients[peer] for peer in peers]
        if not sets:
            raise SettingError(
                "Only the attacker took part in an observed round, so there is no peer to observe. "
                "Raise `federation.clients_per_round` or name other `federation.observed_rounds`."
            )
        return Truth(
            pixels=torch.cat([images.pixels for images in sets]),
            labels=torch.cat([images.labels for images in sets]),
            clients=torch.cat([torch.full((len(images),), peer) for peer, images in zip(peers, sets, strict=True)]),
            training=self.client,
            server_lr=self.server_lr,
            class_names=data.class_names,
            imagenet_labels=data.imagenet_labels,
            sources=[source for images in sets for source in images.sources],
        )

    @torch.no_grad()
    def _evaluate(self, model: ImageClassifier, data: FederatedData) -> dict[str, float]:
        """Loss and accuracy of the global model, on the test set if the data has one, else on the clients' images."""
        if data.test_set is None:
            split, sets = "train", [images for images in data.clients if len(images)]
        else:
            split, sets = "test", [data.test_set]
        model.eval()
        for module in model.modules():  # statistics that are not shared are not the global model's: use the batch's
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and not self.share_buffers:
                module.train()
        state = {name: tensor.clone() for name, tensor in buffers(model).items()}
        loss, correct, total = 0.0, 0, 0
        for images, labels in (batch for held in sets for batch in held.dataloader(256)):
            logits: Tensor = model(images)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += int((logits.argmax(1) == labels).sum())
            total += len(labels)
        model.load_state_dict(state, strict=False)
        model.train()
        return {f"{split}_loss": loss / total, f"{split}_accuracy": correct / total}
