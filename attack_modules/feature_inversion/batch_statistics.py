"""BatchNorm in train mode, undone: the statistics that a peer's images were normalised by are in the running ones."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from attack_modules.threat_model.observed import ObservedRound
from attack_modules.threat_model.requirements import Requirement, SingleRound
from fl_lightning.models import ImageClassifier
from fl_lightning.models.freezing import batch_statistics, keeping_statistics


class BatchStatistics:
    """Lets BatchNorm normalise by what a peer's images were normalised by, which the averaged running statistics show.

    After a step, running statistics are `(1 - m)` of the old and `m` of the batch's, with PyTorch's momentum m. If they
    are shared (`federation.share_buffers`), the peers' mean follows as their update does. With it, the features of an
    image depend on that image alone, and all else is as under frozen BatchNorm (compare GradInversion, Yin et al. 2021,
    which makes a penalty of it).

    Exact for one peer and one local step. Of several steps it is the mean over these; of several peers, the mean over
    peers, which is not what any of them normalised by.
    The attacker's own statistics are taken out in any case, also where its update is not (`subtract_own: false`).
    """

    def requirements(self) -> list[Requirement]:
        """One round."""
        return [SingleRound("model.statistics")]

    @torch.no_grad()
    def freeze(self, model: ImageClassifier, observed: ObservedRound, images: int) -> str | None:
        """Freeze a model's BatchNorm at the peers' statistics, in place.

        Args:
            model: on the CPU, in train mode.
            observed: the round.
            images: number of the peers' images together.

        Returns:
            Why the statistics cannot be had; None if they were frozen.
        """
        names = batch_statistics(model)
        layers = {name: model.get_submodule(name) for name in names}
        if any(layer.momentum is None or not layer.track_running_stats for layer in layers.values()):
            return "a BatchNorm layer keeps no running statistics with a momentum"
        after = observed.observation.peers_buffers()
        if layers and after is None:
            return "the running statistics are not shared, or the attacker's own were not recorded"
        before = observed.observation.before
        named = {f"features.{inside}": name for name, inside in model.feature_names(before).items()}
        pixels = _pixels(model, layers, observed.observation.image_shape)
        for name, layer in layers.items():
            kept = (1 - layer.momentum) ** observed.assumptions.local_steps
            counted = pixels[name] * images
            for kind in ("running_mean", "running_var"):
                full = named[f"{name}.{kind}"]
                batch = (after[full].double() - kept * before[full].double()) / (1 - kept)
                if kind == "running_var":  # of the samples' variance, where BatchNorm normalises by the mean square
                    batch = batch.clamp_min(0) * (counted - 1) / counted
                getattr(layer, kind).copy_(batch)
            layer.eval()
        return None


class PeersNorm(nn.Module):
    """BatchNorm in train mode for several peers' images at once, each normalised by those of its own peer.

    Args:
        layer: whose weight and bias are used.
        sizes: numbers of images of each peer, one peer after the other. Another number of images is taken as peers of
            the first one's size, the last maybe smaller.
    """

    def __init__(self, layer: _BatchNorm, sizes: list[int]) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.eps = layer.eps
        self.sizes = sizes
        self.register_buffer("of_peers", torch.tensor(sizes))  # a decoder of the same weights is kept for these alone

    def forward(self, maps: Tensor) -> Tensor:
        parts = maps.split(self.sizes if len(maps) == sum(self.sizes) else self.sizes[0])
        normalised = [F.batch_norm(p, None, None, self.weight, self.bias, training=True, eps=self.eps) for p in parts]
        return torch.cat(normalised)


def by_peers(model: ImageClassifier, names: Iterable[str], sizes: list[int]) -> ImageClassifier:
    """A copy of a model with `PeersNorm` instead of its BatchNorm layers of these names."""
    copied = copy.deepcopy(model)
    for name in names:
        copied.set_submodule(name, PeersNorm(copied.get_submodule(name), sizes))
    return copied


def _pixels(model: ImageClassifier, layers: dict[str, _BatchNorm], image_shape: tuple[int, int, int]) -> dict[str, int]:
    """How many values of one image each layer averages."""
    found: dict[str, int] = {}

    def note(name: str) -> Any:
        return lambda _, inputs: found.__setitem__(name, inputs[0][0, 0].numel())

    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    with keeping_statistics(model):
        model.embed(torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0)).to(model.mean))
    for hook in hooks:
        hook.remove()
    return found
