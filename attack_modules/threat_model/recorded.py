"""A round of another system, from its model files to a record that attacks read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from attack_modules.threat_model.plausibility import ObservationError, against_own, refuse_impossible
from fl_lightning.errors import SettingError
from fl_lightning.models import ImageClassifier, ImageShape, WrappedClassifier
from fl_lightning.observation import Observation
from fl_lightning.record import Record, RecordError
from fl_lightning.state_files import read_state
from fl_lightning.storage import read_json


def record_round(
    model_class: type[nn.Module],
    arguments: dict[str, Any],
    before: Path,
    after: Path,
    out: Path,
    image_shape: ImageShape | None = None,
    own: Path | None = None,
    own_weight: float = 0.0,
    round: int = 0,
    head: str = "auto",
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> str:
    """Write one observed round into a record: two consecutive global models, and the observing client's own.

    The files are .pt, .pth, .ckpt or .bin of `torch.save`, .safetensors, or .npz, each with a model's tensors by name
    or in the order of its state dict. Nothing that would run code is read from them.

    Args:
        model_class: class of the global model.
        arguments: of its constructor.
        before: file of the global model before the round.
        after: file of the global model after it.
        out: folder of the record; rounds of one federation share it, see `round`.
        image_shape: channels, height and width of an image; null where `model` is an `ImageClassifier`, which tells it.
        own: file of the observing client's model after its own training in the round; null if it did not train.
        own_weight: its share of all examples of the round, below 1.
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
    if issubclass(model_class, ImageClassifier):
        model = model_class(**arguments)
    elif image_shape is None:
        raise SettingError(
            f"{model_class.__name__} does not tell the shape of its images. Give `--image_shape` as channels, height, "
            "width, e.g. `--image_shape 3,64,64`."
        )
    else:
        model = WrappedClassifier.around(model_class, image_shape, arguments or None, head, mean, std)
    observation = Observation.from_models(
        read_state(before),
        read_state(after),
        model=model,
        image_shape=image_shape,
        own=None if own is None else read_state(own),
        own_weight=own_weight,
        round=round,
    )
    refuse_impossible(observation)
    if against_own(observation):
        raise ObservationError(
            f"The update from '{before.name}' to '{after.name}' leads away from where the observing client's own "
            "training led, as if the two were swapped, or `--own` were of another round. Exchange them if so."
        )
    _refuse_other_record(Record(out), observation)
    observation.save(Record(out).observation(round))
    own_class = "" if issubclass(model_class, ImageClassifier) else _named(model_class)
    return (
        f"Round {round} is recorded in '{out}'. The head of {model_class.__name__} is "
        f"{', '.join(model.head_parameters)}.\n"
        f"To attack it: python cli.py fit --config configs/leakage.yaml --observation {out}{own_class}\n"
        "with what you guess of the peers' training: --knowledge.client_lr, --knowledge.server_lr, "
        "--knowledge.local_epochs, and --knowledge.batch_size (null for full batches)."
    )


def _named(model_class: type[nn.Module]) -> str:
    """Options that load a class which a record names; a record itself loads none."""
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
