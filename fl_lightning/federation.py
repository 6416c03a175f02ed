"""The federation: rounds of client sampling, local training and aggregation (FedAvg)."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import Progress

from fl_lightning.aggregation import aggregate, server_step
from fl_lightning.allocation import has_large
from fl_lightning.client import ClientTask, ClientUpdate, LocalTraining, Tensors, parameters, trained_parameters
from fl_lightning.data import FederatedData
from fl_lightning.defenses import (
    ServerDefense,
    describe_defenses,
    guaranteeing,
    memory_of,
    occasions,
    refuse_unfit_order,
)
from fl_lightning.engines import Engine, InProcess
from fl_lightning.errors import SettingError, counted, positive
from fl_lightning.models import ClassifierFactory, ImageClassifier, LeNet5, Trainable
from fl_lightning.models.activations import activation_bytes
from fl_lightning.models.classifier import refuse_tied_parameters
from fl_lightning.models.freezing import batch_statistics, freeze, frozen_names
from fl_lightning.observation import Observation, describe_model, on_meta
from fl_lightning.participation import Participation, listed
from fl_lightning.record import Record, describe
from fl_lightning.scores import scores_of
from fl_lightning.seats import CuriousClient, Seat, View
from fl_lightning.seeds import seed_of
from fl_lightning.server_optimizers import FedAvg, ServerOptimizer
from fl_lightning.state_files import content_of, fitted, read_state
from fl_lightning.storage import has_record, in_a_file, load_checkpoint, save_checkpoint
from fl_lightning.truth import Truth

SERVER = "server"
"""Where the memory of the server's defences is kept, among those of the clients, which go by numbers."""


@dataclass
class Kept:
    """What is kept from round to round beside the global model, changed in place.

    Attributes:
        kept_buffers: BatchNorm's statistics, by client, where they are not shared.
        server_memory: of the server's optimiser, by parameter.
        kept_memory: of defences, by client or `SERVER`.
    """

    kept_buffers: dict[str, Tensors] = field(default_factory=dict)
    server_memory: dict[str, Tensors] = field(default_factory=dict)
    kept_memory: dict[str, Tensors] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> "Kept":
        """What a checkpoint holds of it; those of earlier versions have less."""
        return cls(**{item.name: checkpoint[item.name] for item in fields(cls) if item.name in checkpoint})


class Federation:
    """A server and its clients: FedAvg (McMahan et al. 2017, Algorithm 1).

    With `client.local_epochs: 1` and full batches it is FedSGD. What reaches the `seat` in the observed rounds is
    written to the record; by default that is the last client's, which trains like the others.

    Args:
        model: the global model's class, called with the number of classes and the shape of an image.
        client: the clients' local training.
        rounds: number of communication rounds.
        clients_per_round: clients sampled in each round, of those with images and the observer; null for all of them.
            An observer without images that is sampled receives the models, and sends nothing.
        server_defenses: what the server does to the updates that arrive, or to their mean; `client.defenses` are the
            clients'.
        server_lr: learning rate of the server's step `w_{t+1} = w_t - server_lr * u`, `u` the mean update.
        server: optimiser of the server, which makes another step of `u`; null for FedAvg. The adaptive ones need a
            server_lr of 0.1 or less.
        share_buffers: whether BatchNorm's running statistics are averaged with the model, or stay with each client.
        broadcast: who receives the models before and after a round, and so can observe it. `participants`: the clients
            sampled in it, as in FedAvg's paper and where a server talks to the sampled devices alone. `all`: every
            client, as with Flower, whose server by default has all clients evaluate every round's model.
        seat: who looks; null for the last client.
        observed_rounds: rounds, from 0, that are written to the record; null for the last that can be observed.
        initial_weights: a file of the weights to begin from, as `observe` reads them; null for the model's own (of the
            seed, or its `weights`).
        trainable: what clients train: `all` parameters, those of the `head`, or a list of names of layers or patterns
            of parameter names (`features.6`, `*.bias`). The rest is frozen, its BatchNorm in eval mode; it is not sent.
        engine: where clients run.
        accelerator: what clients train on (`cpu`, `gpu`, `auto`).
        seed: of the model's initial weights, the sampling of clients and the order of mini-batches; null for
            that of `seed_everything`.

    Raises:
        SettingError: a setting is out of range, or two of them do not go together.
    """

    def __init__(
        self,
        model: ClassifierFactory = LeNet5,
        client: LocalTraining = LocalTraining(),  # noqa: B008 - frozen
        rounds: int = 1,
        clients_per_round: int | None = None,
        server_defenses: list[ServerDefense] | None = None,
        server_lr: float = 1.0,
        server: ServerOptimizer | None = None,
        share_buffers: bool = True,
        broadcast: Literal["participants", "all"] = "participants",
        seat: Seat | None = None,
        observed_rounds: list[int] | None = None,
        initial_weights: Path | None = None,
        trainable: Trainable = "all",
        engine: Engine | None = None,
        accelerator: str = "cpu",
        seed: int | None = None,
    ) -> None:
        if rounds < 1 or not positive(server_lr) or (clients_per_round is not None and clients_per_round < 1):
            raise SettingError(
                "`federation` needs rounds >= 1, server_lr > 0 and clients_per_round >= 1 or null, but got "
                f"rounds={rounds}, server_lr={server_lr}, clients_per_round={clients_per_round}."
            )
        if observed_rounds is not None and not (observed_rounds and set(observed_rounds) <= set(range(rounds))):
            raise SettingError(
                f"`federation.observed_rounds` is [{listed(observed_rounds)}], but rounds go from 0 to {rounds - 1}. "
                "Name rounds among them, or null for the last, or raise `federation.rounds`."
            )
        self.model = model
        self.initial_weights = initial_weights
        self.trainable = trainable
        self.client = client
        self.rounds = rounds
        self.clients_per_round = clients_per_round
        self.server_defenses = server_defenses or []
        self.server_lr = server_lr
        self.server = server or FedAvg()
        self.share_buffers = share_buffers
        self.broadcast = broadcast
        self.seat = seat or CuriousClient()
        refuse_unfit_order(self.server_defenses)
        if self.server_defenses and self.seat.has_the_mean:
            raise SettingError(
                "A server behind secure aggregation has the clients' mean before its own "
                f"{type(self.server_defenses[0]).__name__} changes it, so `federation.server_defenses` hide nothing "
                "from it. Leave them out, defend at the clients (`federation.client.defenses`), or choose another "
                "`federation.seat`."
            )
        self.observed_rounds = None if observed_rounds is None else sorted(set(observed_rounds))
        self.engine = engine or InProcess()
        self.accelerator = accelerator
        self.seed = seed or 0

    def initial_model(self, data: FederatedData) -> ImageClassifier:
        """The global model `w_0` for this data (after `data.setup()`).

        Raises:
            StateError: `initial_weights` cannot be read or are of another model.
            SettingError: `trainable` names no parameter.
        """
        with isolate_rng():
            torch.manual_seed(self.seed)
            model = self.model(data.num_classes, data.image_shape)
        if path := self.initial_weights:
            source = f"`federation.initial_weights` '{path}'"
            model.load_state_dict(fitted(read_state(path), model.state_dict(), source))
        return freeze(model, frozen_names(model, self.trainable))

    def participation(self, data: FederatedData) -> Participation:
        """Who takes part in the rounds (after `data.setup()`)."""
        return Participation(
            [len(images) for images in data.clients], self.seat, self.rounds, self.clients_per_round, self.broadcast,
            self.observed_rounds, self.server, self.seed,
        )  # fmt: skip

    def settings(self, data: FederatedData) -> dict[str, Any]:
        """Everything that determines the federation's course and what is observed of it, as plain JSON types.

        `broadcast` is not among it: it only says which rounds may be observed.

        Raises:
            SettingError: a round cannot be observed, there is one class only, `trainable` names no parameter, class
                weights are not as many as classes, all clients collude, the model has tied parameters or a
                normalisation of other channels, or its BatchNorm breaks a guarantee of privacy.
            MissingFile: there are no `initial_weights`.
        """
        data.setup()
        if data.num_classes < 2:
            raise SettingError(
                f"All images are of one class, '{data.class_names[0]}', so training changes nothing and nothing leaks. "
                "Add images of other classes, or set `data.num_classes` to 2 or more."
            )
        weights = self.client.class_weights
        if weights is not None and len(weights) != data.num_classes:
            raise SettingError(
                f"`federation.client.class_weights` has {len(weights)} numbers, but there are {data.num_classes} "
                "classes. Give one for each."
            )
        if len(self.seat.members(data.num_clients)) >= data.num_clients:
            raise SettingError(
                f"All {data.num_clients} clients collude, so there is no peer to attack. Lower "
                "`federation.seat.count`, or raise `data.num_clients`."
            )
        model = on_meta(lambda: self.model(data.num_classes, data.image_shape))
        frozen = frozen_names(model, self.trainable)
        self._refuse_unfit_model(freeze(model, frozen), data.image_shape[0])
        return {
            "model": describe_model(model),
            "initial_weights": None if self.initial_weights is None else content_of(self.initial_weights),
            "frozen": sorted(frozen),
            "client": self.client.describe(),
            "rounds": self.rounds,
            "clients_per_round": self.clients_per_round,
            "server_lr": self.server_lr,
            "server": self.server.describe(),
            "server_defenses": describe_defenses(self.server_defenses),
            "share_buffers": self.share_buffers,
            "seat": describe(self.seat),
            "observed_rounds": self.participation(data).observed(),
            "seed": self.seed,
            "data": data.describe() | {"content": data.content},
        }

    def _refuse_unfit_model(self, model: ImageClassifier, channels: int) -> None:
        """Refuse a model of tied parameters, for other channels, or with statistics beside a guarantee of privacy."""
        refuse_tied_parameters(model, type(model).__name__)
        for name, values in (("mean", model.mean), ("std", model.std)):
            if values.numel() not in (1, channels):  # PyTorch would repeat the one channel of a greyscale image
                raise SettingError(
                    f"The model's `{name}` has {values.numel()} values, but images have "
                    f"{counted(channels, 'channel')}. Give one value for each channel or one for all "
                    f"(`federation.model.{name}`), or set `data.channels`."
                )
        promising, layers = guaranteeing([*self.client.defenses, *self.server_defenses]), batch_statistics(model)
        if self.share_buffers and promising and layers:
            raise SettingError(
                f"{promising[0]} guarantees nothing beside BatchNorm ('{layers[0]}' of {type(model).__name__}), whose "
                "statistics are sent without noise. Set `federation.share_buffers: false`, freeze it "
                "(`federation.trainable`), or choose a model without it."
            )

    def introduction(self, data: FederatedData) -> str:
        """The federation in one sentence."""
        training = self.client
        batches = "full batches" if training.batch_size is None else f"batches of {training.batch_size}"
        model = self.settings(data)["model"]["class_path"].rpartition(".")[2]
        return (
            f"Federation: {model}, {data.num_classes} classes; {counted(data.num_clients, 'client')} with "
            f"{sum(len(images) for images in data.clients)} images of {'x'.join(map(str, data.image_shape))} "
            f"({type(data).__name__}); {counted(self.rounds, 'round')} of "
            f"{counted(training.local_epochs, 'local epoch')}, {batches}, lr {training.lr:g}."
        )

    def peak_memory(self, data: FederatedData) -> int:
        """Bytes that the rounds take at most beside the program, as a forecast from shapes (after `data.setup()`).

        Beside the global model, a client has its own, the gradients, the optimiser's state and the activations of a
        batch, while the mean of the clients before is kept, and what the seat knows of them.
        """
        model = on_meta(lambda: self.model(data.num_classes, data.image_shape))
        freeze(model, frozen_names(model, self.trainable))
        whole = sum(tensor.nbytes for tensor in model.state_dict().values())
        trained = sum(tensor.nbytes for tensor in trained_parameters(model).values())
        sizes = [len(images) for images in data.clients]
        kept = sum(self.seat.keeps(client, len(sizes)) for client in range(len(sizes) - 1))
        state = 2 if self.client.optimizer == "Adam" else int(self.client.momentum > 0)
        batch = min(self.client.batch_size or max(sizes), max(sizes))
        passes = max(1.5 * batch, min(256, max(sizes)))  # with the gradients of activations; `scores_of` has none
        activations = activation_bytes(model, data.image_shape, of_images=False)
        return 2 * whole + (2 + state + kept) * trained + int(passes * activations)

    def run(self, data: FederatedData, directory: Path) -> None:
        """Run all rounds, or those that are missing, and leave a `Record` in `directory`.

        The global model is saved after every round, so an interrupted run continues with the next round and ends
        with the same weights as an uninterrupted one. If the Observation of a former round is missing, all rounds are
        run again. A process that comes second waits for the first, and then finds its record.

        Raises:
            RecordError: the directory holds the record of a federation with other settings.
            StorageError: the disk is full, or the directory is not writable.
        """
        settings = json.loads(json.dumps(self.settings(data)))
        record, takes_part, observed = Record(directory), self.participation(data), settings["observed_rounds"]
        if record.settings.exists():
            record.claim(settings)
            if self._is_complete(takes_part, record, observed):
                return  # without a lock, for which the folder would have to be writable
        with record.locked():
            record.claim(settings)
            if self._is_complete(takes_part, record, observed):
                return
            try:
                self._run(data, takes_part, record, observed)
            except (KeyboardInterrupt, SystemExit):  # a client's Trainer turns the first into the second
                print("Interrupted. Finished rounds are kept, and the same command goes on after them.", flush=True)
                raise KeyboardInterrupt from None

    def _is_complete(self, takes_part: Participation, record: Record, observed: list[int]) -> bool:
        if not record.checkpoint.exists() or load_checkpoint(record.checkpoint)["rounds_done"] < self.rounds:
            return False
        stems = [
            *(record.observation(*view) for view in takes_part.views(takes_part.recorded())),
            *(record.truth(*view) for view in takes_part.views(observed)),
        ]
        return all(map(has_record, stems))

    def _run(self, data: FederatedData, takes_part: Participation, record: Record, observed: list[int]) -> None:
        for view in takes_part.views(observed):
            if not has_record(record.truth(*view)):
                self.truth(view[0], data, view[1]).save(record.truth(*view))
        model = self.initial_model(data)
        kept, recorded, start = Kept(), takes_part.recorded(), 0
        if record.checkpoint.exists():
            state = load_checkpoint(record.checkpoint)
            done = takes_part.views([r for r in recorded if r < state["rounds_done"]])
            lost = sorted({view[0] for view in done if not has_record(record.observation(*view))})
            if lost:
                print(
                    f"'{record.directory}' lacks observed round {listed(lost)}: all rounds are run again.", flush=True
                )
            else:
                model.load_state_dict(state["model"])
                start, kept = state["rounds_done"], Kept.of(state)
        _ = data.test_set  # one that cannot be read is refused before the rounds, not after the first
        logger = TensorBoardLogger(record.directory, name="", version="tensorboard")
        # several clients, a server, and defences on arrival know more than what crosses one client's wire
        one_wire = len(takes_part.members) == 1 and not self.server_defenses
        running = self.engine.running(data.num_clients, data.attacker, record.directory)
        with running, Progress() as progress:
            task = progress.add_task("Federation, rounds", total=self.rounds, completed=start)
            for round_ in range(start, self.rounds):
                receivers, training = takes_part.receivers(round_), takes_part.training(round_)
                self.engine.announce(model, round_, [client for client in receivers if client not in training])
                if in_file := has_large(model.parameters()):
                    mapped = in_a_file(model.state_dict(), record.directory / "global_model.safetensors")
                    model.load_state_dict(mapped, assign=True)
                    del mapped
                model, observations = self._round(round_, model, data, training, kept, in_file)
                self.engine.announce(model, round_ + 1, receivers)
                if round_ in recorded:
                    for client, observation in observations.items():
                        if one_wire:
                            observation = self.engine.received(observation)
                        observation.save(record.observation(round_, client))
                observations = observation = None  # no other model is held beside the scoring
                save_checkpoint(
                    record.checkpoint,
                    {"rounds_done": round_ + 1, "model": model.state_dict(), **vars(kept)},
                )
                scores = scores_of(model, data, self.share_buffers)
                logger.log_metrics(scores, step=round_ + 1)
                logger.save()
                shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in scores.items())
                progress.update(task, advance=1, description=f"Federation, rounds ({shown})")
                if self.rounds > 1:
                    progress.print(f"After round {round_}: {shown}")
        logger.finalize("success")

    def _round(
        self,
        round_: int,
        model: ImageClassifier,
        data: FederatedData,
        training: list[int],
        kept: Kept,
        in_file: bool = False,
    ) -> tuple[ImageClassifier, dict[View, Observation]]:
        """The next global model, and what the seat sees of the round if it receives its models.

        The tensors of the model may be `in_file`, a mapped one.
        """
        before = dict(model.state_dict())  # the next model gets tensors of its own, so that these stay
        seed = seed_of(self.seed, round_)
        at_server = occasions(self.server_defenses, parameters(model), seed, kept.kept_memory.get(SERVER, {}))
        members = self.seat.members(data.num_clients)
        known: dict[int, ClientUpdate] = {}

        def tasks() -> Iterator[ClientTask]:
            for client in training:
                own_seed, own_memory = seed_of(self.seed, round_, client), kept.kept_memory.get(str(client), {})
                own_buffers = None if self.share_buffers else kept.kept_buffers.get(str(client), {})
                yield ClientTask(
                    model, data.clients[client], own_seed, own_memory, client, round_, own_buffers, in_file
                )

        def updates() -> Iterator[ClientUpdate]:
            results = self.engine.train(tasks(), self.client, self.accelerator)
            for client in training:
                result = next(results)
                if not self.share_buffers:
                    kept.kept_buffers[str(client)] = result.buffers
                if result.memory:
                    kept.kept_memory[str(client)] = result.memory
                sent = result if self.share_buffers else replace(result, buffers={})
                for defense, occasion in at_server:
                    arrived = defense.on_arrival(result.update, result.num_examples, occasion)
                    result = replace(result, update=arrived)
                if self.seat.keeps(client, data.num_clients):  # its part of the mean, or what a curious server receives
                    known[client] = result if client in members else sent
                yield result
                del result, sent  # before the next client trains

        if not training:  # only an observer without images was sampled
            after = {name: tensor.clone() for name, tensor in before.items()}
            return model, {None: Observation(round_, before, after, {}, 0.0, describe_model(model))}
        mean = aggregate(updates())
        update, total, averaged = mean.update, mean.num_examples, mean.buffers if self.share_buffers else {}
        del mean
        for defense, occasion in at_server:
            update = defense.on_mean(update, occasion)
        if self.server_defenses:
            kept.kept_memory[SERVER] = memory_of(at_server)
        stays = {name: tensor.clone() for name, tensor in before.items() if name not in update | averaged}
        parameters_after = server_step(
            parameters(model), update, self.server_lr, self.server, kept.server_memory, round_
        )
        model.load_state_dict({**parameters_after, **stays, **averaged}, assign=True)
        whole = Observation(round_, before, dict(model.state_dict()), {}, 0.0, describe_model(model))
        return model, self.seat.observe(whole, known, total)

    def truth(self, round_: int, data: FederatedData, client: View = None) -> Truth:
        """The ground truth of a round, or of one client's update in it, which is known before the round is run.

        Raises:
            SettingError: no peer of the observing client takes part in the round.
        """
        peers = self.participation(data).peers(round_) if client is None else [client]
        sets = [data.clients[peer] for peer in peers]
        if not sets:
            raise SettingError(
                f"Only the attacker takes part in round {round_}, so there is no peer to observe. "
                "Raise `federation.clients_per_round` or name other `federation.observed_rounds`."
            )
        return Truth(
            pixels=torch.cat([images.pixels for images in sets]),
            labels=torch.cat([images.labels for images in sets]),
            clients=torch.cat([torch.full((len(images),), peer) for peer, images in zip(peers, sets, strict=True)]),
            training=self.client,
            server_lr=self.server_lr if client is None else 1.0,
            server=self.server if client is None else FedAvg(),
            server_defenses=self.server_defenses if client is None else [],
            class_names=data.class_names,
            imagenet_labels=data.imagenet_labels,
            sources=[source for images in sets for source in images.sources],
            persons=[person for images in sets for person in images.persons],
        )
