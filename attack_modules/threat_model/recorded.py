"""Rounds of another system, from their model files to a record that attacks read."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from attack_modules.threat_model.plausibility import ObservationError, against_own, refuse_impossible
from fl_lightning.errors import SettingError
from fl_lightning.foreign import RecordedRound, recorded_rounds
from fl_lightning.models import ImageClassifier, ImageShape, WrappedClassifier
from fl_lightning.observation import Observation
from fl_lightning.record import Record, RecordError
from fl_lightning.state_files import read_state
from fl_lightning.storage import read_json

GUESSES = {
    "client_lr": "the learning rate of the peers' SGD, above 0, such as 0.003",
    "server_lr": "the server's learning rate, above 0; 1 where it takes the mean of the models",
    "local_epochs": "the peers' passes over their images in a round, from 1",
    "batch_size": "images of a mini-batch, from 1; null for full batches",
}
"""What nobody tells the attacker of rounds of another system, with its allowed values."""


def record_round(
    model_class: Callable[..., nn.Module],
    arguments: dict[str, Any],
    out: Path,
    before: Path | None = None,
    after: Path | None = None,
    recorded: Path | None = None,
    image_shape: ImageShape | None = None,
    own: Path | None = None,
    own_weight: float = 0.0,
    total_examples: int | None = None,
    round: int = 0,
    head: str = "auto",
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> str:
    """Write observed rounds into a record: two consecutive global models, and the observing client's own, of each.

    Either one round's files are named by `before` and `after`, or the folder of a `fl_lightning.foreign.Recorder` by
    `recorded`, with all of its rounds. Files are .pt, .pth, .ckpt or .bin of `torch.save`, .safetensors, or .npz, each
    with a model's tensors by name or in the order of its state dict. Nothing that would run code is read from them.

    Args:
        model_class: class of the global model, or a function that is annotated to return it.
        arguments: of it, by name.
        out: folder of the record; rounds of one federation share it, see `round`.
        before: file of the global model before the round.
        after: file of the global model after it.
        recorded: folder that a recorder in a running client wrote, instead of `before`, `after`, `own` and `round`.
        image_shape: channels, height and width of an image; null where `model` is an `ImageClassifier`, which tells it.
        own: file of the observing client's model after its own training in the round; null if it did not train.
        own_weight: its share of all examples of the round, below 1; for `recorded`, of rounds without a recorded one.
        total_examples: examples of all clients in a round, by which the number that was recorded is divided; null if
            the share itself is known.
        round: number of the round, from 0.
        head: `auto`, or the model's name of the layer or container that limits its head, see `WrappedClassifier`.
        mean: by which images in [0, 1] are normalised before the model, one number per channel or one for all.
        std: likewise.

    Returns:
        What was written, and how it is attacked.

    Raises:
        AuditError: a file cannot be read or does not fit the model, the models cannot be a round of training, or the
            record is of another federation or has this round already.
    """
    if round < 0:
        raise SettingError(f"`round` is {round}, but rounds are counted from 0.")
    rounds = _rounds(before, after, recorded, own, own_weight, total_examples, round)
    ours = isinstance(model_class, type) and issubclass(model_class, ImageClassifier)
    if ours:
        model = model_class(**arguments)
    elif image_shape is None:
        raise SettingError(
            f"{model_class.__name__} does not tell the shape of its images. Give `--image_shape` as channels, height, "
            "width, e.g. `--image_shape 3,64,64`."
        )
    else:
        model = WrappedClassifier.around(model_class, image_shape, arguments or None, head, mean, std)
    left_out: dict[int, ObservationError] = {}
    for files in rounds:
        observation = _observation(files, model, image_shape)
        try:
            _refuse_implausible(observation, files)
        except ObservationError as error:  # a recorder also keeps rounds in which nothing was aggregated
            if len(left_out) == len(rounds) - 1:
                raise
            left_out[files.round] = error
            continue
        _refuse_other_record(Record(out), observation)
        observation.save(Record(out).observation(files.round))
    written = [str(files.round) for files in rounds if files.round not in left_out]
    reasons = "".join(f"Round {number} is left out: {error}\n" for number, error in left_out.items())
    options = "" if ours else _named(model_class)
    return (
        f"{reasons}Recorded in '{out}': round {', '.join(written)}. The head of {model_class.__name__} is "
        f"{', '.join(model.head_parameters)}.\n"
        "To attack it, with what you know or guess of the peers' training in place of the words in capitals:\n"
        f"python cli.py fit --config configs/leakage.yaml --observation {shlex.quote(str(out))}{options} "
        + " ".join(f"--knowledge.{name} {name.upper()}" for name in GUESSES)
        + "".join(f"\n  {name.upper()}: {allowed}" for name, allowed in GUESSES.items())
    )


def _rounds(
    before: Path | None,
    after: Path | None,
    recorded: Path | None,
    own: Path | None,
    own_weight: float,
    total_examples: int | None,
    round: int,
) -> list[RecordedRound]:
    """The files of each round, with the observing client's share in it."""
    if recorded is None:
        if before is None or after is None or total_examples is not None:
            raise SettingError(
                "Give either `--before` and `--after`, two consecutive global models, with `--own` and `--own_weight`, "
                "or `--recorded`, the folder of a recorder, with `--own_weight` or `--total_examples`."
            )
        return [RecordedRound(round, before, after, own, own_weight)]
    if (before, after, own, round) != (None, None, None, 0):
        raise SettingError(
            "`--recorded` names a folder with all files of its rounds: leave out `--before`, `--after`, `--own` and "
            "`--round`, or name one round's files without `--recorded`."
        )
    return [replace(files, own_weight=_share(files, own_weight, total_examples)) for files in recorded_rounds(recorded)]


def _share(files: RecordedRound, own_weight: float, total_examples: int | None) -> float:
    if files.own is None:
        return 0.0
    if files.own_weight is not None:
        return files.own_weight
    if total_examples is None and own_weight:
        return own_weight
    if not total_examples or not files.num_examples or own_weight or total_examples <= files.num_examples:
        raise SettingError(
            f"In round {files.round} the client trained on {files.num_examples or 'an unknown number of'} examples, "
            f"but its share is not recorded. Give `--own_weight`, or `--total_examples`, those of all clients and so "
            f"more (now {total_examples}), but not both; guess it where you do not know it."
        )
    return files.num_examples / total_examples


def _observation(files: RecordedRound, model: ImageClassifier, image_shape: ImageShape | None) -> Observation:
    return Observation.from_models(
        read_state(files.before),
        read_state(files.after),
        model=model,
        image_shape=image_shape,
        own=None if files.own is None else read_state(files.own),
        own_weight=files.own_weight,
        round=files.round,
    )


def _refuse_implausible(observation: Observation, files: RecordedRound) -> None:
    refuse_impossible(observation)
    if against_own(observation):
        raise ObservationError(
            f"The update from '{files.before.name}' to '{files.after.name}' leads away from where the observing "
            "client's own training led, as if the two were swapped, or `--own` were of another round. Exchange them if "
            "so."
        )


def _named(model_class: Callable[..., nn.Module]) -> str:
    """Options that load a class or function which a record names; a record itself loads none."""
    path = f"{model_class.__module__}.{model_class.__qualname__}"
    return f" --federation.model WrappedClassifier --federation.model.module {path}"


def _refuse_other_record(record: Record, observation: Observation) -> None:
    if record.settings.exists():
        raise RecordError(
            f"'{record.directory}' holds a federation that was simulated here. Name another folder with `--out`."
        )
    for round_ in record.observed_rounds:
        path = record.observation(round_).with_suffix(".json")
        if round_ == observation.round:
            raise RecordError(f"'{path}' exists. Give another `--round`, or delete this one, or name another `--out`.")
        if read_json(path).get("model") != observation.model:
            raise RecordError(
                f"Round {round_} of '{record.directory}' is of another model, or of this one with other arguments. "
                "Name another folder with `--out`."
            )
