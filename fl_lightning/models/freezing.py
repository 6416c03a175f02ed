"""Which parameters of a global model clients train; the others are frozen."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fl_lightning.errors import SettingError
from fl_lightning.models.classifier import ImageClassifier

Trainable = Literal["all", "head"] | list[str]
"""All parameters, those of the head, or those that patterns name."""


def frozen_names(model: ImageClassifier, trainable: Trainable) -> set[str]:
    """Names of the parameters and buffers that are not to be trained, also where the model itself excludes them.

    Args:
        model: may be on the meta device.
        trainable: patterns are as of a shell, `features.6.*`, or the name of a module or parameter, `features.6`.

    Raises:
        SettingError: a pattern fits no parameter that could be trained.
    """
    able = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    patterns = {"all": ["*"], "head": model.head_parameters}[trainable] if isinstance(trainable, str) else trainable
    unfit = [pattern for pattern in patterns if not any(fits(name, pattern) for name in able)]
    if unfit or not patterns:
        raise SettingError(
            f"`federation.trainable` is {str(trainable)[:80]}, but {unfit[0] if unfit else 'this'} names no parameter "
            f"that could be trained; there are {', '.join(able[:3])[:120]}, ... Give `all`, `head`, or patterns "
            "such as `features.6.*`."
        )
    held = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    return {*held, *(name for name in model.state_dict() if not any(fits(name, pattern) for pattern in patterns))}


def fits(name: str, pattern: str) -> bool:
    """Whether a parameter is meant by a pattern of a shell, or by its own name or that of a module around it."""
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def freeze(model: ImageClassifier, names: Collection[str]) -> ImageClassifier:
    """Exclude parameters from training, in place; BatchNorm of which nothing is trained uses its running statistics.

    Args:
        model: may be on the meta device.
        names: of parameters, and of buffers where BatchNorm's statistics are frozen too.
    """
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
    if not names:
        return model
    kept = {id(tensor) for name, tensor in model.state_dict(keep_vars=True).items() if name in names}
    for parent in model.modules():
        for layer in parent.children():
            if isinstance(layer, _BatchNorm) and layer.track_running_stats:
                # without parameters of its own it is frozen where the module around it is
                judged = layer if layer.affine else parent
                if all(id(tensor) in kept for tensor in judged.state_dict(keep_vars=True).values()):
                    layer.eval()
    return model


@contextmanager
def keeping_statistics(model: nn.Module) -> Iterator[None]:
    """Undo what forward passes in train mode do to the running statistics, which may be those of an Observation."""
    kept = {name: tensor.clone() for name, tensor in model.named_buffers()}
    try:
        yield
    finally:
        for name, tensor in model.named_buffers():
            tensor.copy_(kept[name])


def batch_statistics(model: nn.Module) -> list[str]:
    """Names of the BatchNorm layers that normalise by the statistics of the batch that they are given."""
    return [n for n, layer in model.named_modules() if isinstance(layer, _BatchNorm) and layer.training]
