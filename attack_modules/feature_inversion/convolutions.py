"""Inversion of a map in front of a convolution, which that one's update shows, instead of the head's features."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from attack_modules.analytic.convolution_maps import Convolution, Maps, read_maps
from attack_modules.analytic.pooled_maps import READ, Pooled, maps_before_pooling
from attack_modules.analytic.residual_blocks import errors_before
from attack_modules.analytic.results import Leakage
from attack_modules.attack import Level, Verdict
from attack_modules.feature_inversion.peers_maps import Path, read_back
from attack_modules.feature_inversion.pooling_positions import Gradient, PoolingPositions
from attack_modules.feature_inversion.soft_pooling import SoftPooling
from attack_modules.threat_model.requirements import Requirement, SingleRound
from fl_lightning.client import Tensors
from fl_lightning.errors import counted
from fl_lightning.models import ImageClassifier, ImageShape
from fl_lightning.models.freezing import keeping_statistics

TRIED = 3
"""Convolutions that are tried, the first in the network first."""
SAME_FEATURES = 0.1
"""Relative distance of a map's features to those that the head shows, up to which they are of one image. Measured:
0.001 to 0.02."""
CLEARER = 3.0
"""Factor from that distance to the one of the negative map, from which the sign is known."""
ENDS = 0.01
"""Misfit up to which an image has its map. Measured: 0.002 to 0.008 where images came out at 29 dB and more, 0.01 to
0.04 where at 20 to 28."""
NEGATIVE = 0.5
"""Sum of a map's negative entries over that of its positive ones, up to which its sum tells its sign."""
ROUNDS = 20
"""Iterations of a map's size. One is enough without biases."""


class Shown(NamedTuple):
    """What takes the place of the head's features.

    Attributes:
        model: of which `embed` gives the map in front of a convolution.
        features: (N, D) in the order of the head's.
        uncertainty: (N,) expected relative errors.
        layer: name of the convolution.
        order: (N,) long, which of the head's images these are, where they are in another order; None else.
        peers: (N,) long, where images depend on the others of their peer, as through BatchNorm in train mode; then all
            pass through the model at once. None else.
        start: makes images of such maps, where these are behind a first convolution and max pooling; None else.
        gradient: what that convolution's update shows beside its map.
    """

    model: ImageClassifier
    features: Tensor
    uncertainty: Tensor
    layer: str
    order: Tensor | None = None
    peers: Tensor | None = None
    start: Callable[[Tensor], Tensor] | None = None
    gradient: Gradient | None = None

    def instead(self, leakage: Leakage) -> Leakage:
        """What the head shows, with the maps instead of features, in their order."""
        of_map = {"features": self.features, "uncertainty": self.uncertainty, "seen": None, "weights": None}
        if self.order is not None:
            ones = None if leakage.ones is None else leakage.ones[self.order]
            peers = torch.zeros_like(self.order) if self.peers is None else self.peers
            of_map |= {"labels": leakage.labels[self.order], "peers": peers, "ones": ones}
        return replace(leakage, **of_map)

    def limited(self, verdict: Verdict, misfit: Tensor, pixels: int) -> Verdict:
        """The verdict, with images that do not have their map no better than likely.

        Images that are hard to descend on are the detailed ones, which known images of the expected PSNR are not. Nor
        do known images tell how unlike them those are that a map of fewer numbers than pixels leaves open.

        Args:
            verdict: of N images.
            misfit: (N,) relative distance of the images' maps to those that were read.
            pixels: numbers of an image, all channels together.
        """
        numbers, ends = self.features.shape[1], misfit <= ENDS
        levels, reasons, advice = verdict.levels, list(verdict.reasons), list(verdict.advice)
        if not ends.all():
            pairs = zip(levels, ends.tolist(), strict=True)
            levels = [level if ended else level.limited(Level.LIKELY) for level, ended in pairs]
            reasons.append(f"{counted(int((~ends).sum()), 'image')} came out with another map than was read")
            advice.append("More steps (`trainer.max_steps`) may bring images nearer to their maps.")
        if numbers < pixels:
            levels = [level.limited(Level.UNRELIABLE) for level in levels]
            reasons.append(f"a map of {numbers:,} numbers leaves an image of {pixels:,} open")
            advice.append("Fewer images show an earlier, larger map.")
        return replace(verdict, levels=levels, reasons=reasons, advice=advice)

    def introduction(self) -> str:
        """What is inverted, in one line."""
        return f"Convolutions: the maps in front of {self.layer} are inverted, off by {self.uncertainty.max():.1%}."


class Convolutions:
    """Reads the maps in front of a convolution, which hold more of an image than the head's features.

    Where a few images were trained on, the update of a convolution of many channels has no more directions than images
    and positions, and gives away its input map for every image (`analytic/convolution_maps.py`). Of all such layers,
    the first is taken, whose map holds most. Which map is whose, and how large it is, follows from the head's features.

    One local step or few of one round. In front of BatchNorm in train mode, of a single local step, with
    `model.statistics`: there the number of peers and who trained together follow as well, and the blocks of a residual
    network are followed back from the map that is read to the earliest that their updates determine
    (`analytic/residual_blocks.py`).
    """

    def requirements(self) -> list[Requirement]:
        """One round."""
        return [SingleRound("model.convolutions")]

    def read(
        self,
        model: ImageClassifier,
        update: Tensors,
        leakage: Leakage,
        image_shape: ImageShape,
        batch_norm: frozenset[str],
        steps: int,
    ) -> Shown | None:
        """The first map that is shown; None, with a warning, where no update shows one.

        Args:
            model: half way through the training, on the CPU; its BatchNorm frozen.
            update: the peers' without weight decay, by parameter name.
            leakage: what the head's update shows.
            image_shape: (C, H, W).
            batch_norm: names of the layers that normalised by their batch's statistics when the peers trained.
            steps: that each peer took.
        """
        images = len(leakage.labels)
        of_layers = {f"features.{inside}": update[name] for name, inside in model.feature_names(update).items()}
        known = [of for of in _convolutions(model, image_shape, batch_norm) if of_layers[f"{of.name}.weight"].any()]
        able = [of for of in known if of.shows(images)]
        if leakage.diagnosis.disentangled == leakage.diagnosis.num_images and leakage.mixing is None:
            for convolution in able[:TRIED]:
                found = read_maps(of_layers[f"{convolution.name}.weight"], convolution, images)
                if found and found.peers is not None:
                    normalised = batch_norm if steps == 1 else frozenset()
                    if shown := self._shared(model, of_layers, convolution, found, leakage, image_shape, normalised):
                        return shown
                    if images > 1:
                        continue
                sized = found and self._sized(model, convolution, found, leakage, image_shape)
                if sized is not None:
                    if not convolution.centred:
                        return _followed_back(
                            model, convolution, sized, found.uncertainty, of_layers, leakage, image_shape
                        )
                    embed = MapClassifier(model, convolution.name, found.unseen)
                    uncertainty = torch.full((images,), found.uncertainty, dtype=leakage.uncertainty.dtype)
                    return Shown(embed, sized.to(leakage.features), uncertainty, convolution.name)
        why = "none of these shows maps" if able else "none has as many outputs as there are positions of all images"
        rank_zero_warn(
            f"`model.convolutions` has no effect: of {len(known)} trained convolutions {why}, so the head's "
            "features are inverted. Fewer images and a single local step show more."
        )
        return None

    def _shared(
        self,
        model: ImageClassifier,
        update: Tensors,
        convolution: Convolution,
        found: Maps,
        leakage: Leakage,
        image_shape: ImageShape,
        batch_norm: frozenset[str],
    ) -> Shown | None:
        """The earliest maps of several peers' images that BatchNorm in train mode normalised by peer."""
        if convolution.behind not in batch_norm or model.get_submodule(convolution.behind).training:
            return None
        known = leakage.features.to(model.mean)
        if leakage.ones is not None:
            known = known / leakage.ones.to(known)[:, None]
        read = read_back(model, convolution, found, update, known, image_shape, batch_norm)
        if read is None:
            return None
        embed = MapClassifier(read.model, read.convolution.name, read.unseen)
        uncertainty = torch.full((len(known),), read.uncertainty, dtype=leakage.uncertainty.dtype)
        features = read.maps.flatten(1).to(leakage.features)
        peers = read.peers if read.peers.any() else None
        return Shown(embed, features, uncertainty, read.convolution.name, read.order, peers)

    def _sized(
        self, model: ImageClassifier, convolution: Convolution, found: Maps, leakage: Leakage, image_shape: ImageShape
    ) -> Tensor | None:
        """(N, D) the maps in the order and size of the images; None where they contradict the head's features."""
        known = leakage.features.to(model.mean)
        if leakage.ones is not None:
            known = known / leakage.ones.to(known)[:, None]
        sized = _sized_by_statistics if convolution.centred else _sized_by_features
        return sized(model, convolution, found, known, image_shape)


@torch.no_grad()
def _convolutions(model: ImageClassifier, image_shape: ImageShape, batch_norm: frozenset[str]) -> list[Convolution]:
    """All that maps of the images pass through, with what follows them."""
    maps: dict[str, tuple[int, int, int]] = {}
    outputs: dict[int, tuple[str, Tensor, int]] = {}  # the tensors are kept, so that no other one gets the same id
    behind: dict[str, str] = {}
    either: set[str] = set()

    def watch(name: str, layer: nn.Module) -> Any:
        def note(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            if isinstance(layer, nn.Conv2d):
                maps[name] = tuple(inputs[0].shape[1:])
                negative, positive = (-inputs[0]).relu().sum((1, 2, 3)), inputs[0].relu().sum((1, 2, 3))
                either.update({name} if (negative > NEGATIVE * positive).any() else ())
                outputs[id(output)] = name, output, output._version
            elif id(inputs[0]) in outputs and name in batch_norm:
                before, _, version = outputs[id(inputs[0])]
                if inputs[0]._version == version:  # an activation in place would be between
                    behind[before] = name

        return layer.register_forward_hook(note)

    layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, nn.Conv2d | _BatchNorm)}
    hooks = [watch(name, layer) for name, layer in layers.items()]
    with keeping_statistics(model):
        noise = torch.rand(image_shape, generator=torch.Generator().manual_seed(0))
        model.embed(torch.stack([noise, torch.zeros_like(noise), torch.ones_like(noise)]).to(model.mean))
    for hook in hooks:
        hook.remove()
    return [Convolution(n, layers[n], shape, behind.get(n), n not in either) for n, shape in maps.items()]


@torch.no_grad()
def _followed_back(
    model: ImageClassifier,
    convolution: Convolution,
    sized: Tensor,
    uncertainty: float,
    update: Mapping[str, Tensor],
    leakage: Leakage,
    image_shape: ImageShape,
) -> Shown:
    """The earliest maps that follow from those (N, D) in front of a convolution, through ReLU and max pooling."""
    path, name, maps = Path(model, image_shape), convolution.name, sized.unflatten(1, convolution.map_shape)
    errors = errors_before(convolution.layer, maps, update[f"{name}.weight"])
    start, gradient = None, None
    while errors is not None and (behind := _behind(model, path, name)):
        before, of = behind
        gradient_of = update[f"{before}.weight"].to(maps)
        shape = path.shape[before]
        if before not in path.source or not _behind(model, path, before):  # the first one takes the images
            if of.pooling and shape == tuple(image_shape) and PoolingPositions.fits(of.layer, of.pooling, image_shape):
                start = PoolingPositions(model, of.layer, of.pooling, image_shape)
                gradient = Gradient(gradient_of, errors)
            break
        if not of.reads(len(maps), shape[1] * shape[2]):
            break
        read = maps_before_pooling(of, maps, errors, gradient_of, shape[1:])
        if not read.misfit <= READ:  # nor NaN
            break
        name, maps, uncertainty = before, read.maps, max(read.misfit, uncertainty)
        errors = errors_before(of.layer, maps, gradient_of)
    unseen = maps.new_zeros(0, *maps.shape[2:])
    expected = torch.full((len(maps),), uncertainty, dtype=leakage.uncertainty.dtype)
    features = maps.flatten(1).to(leakage.features)
    return Shown(MapClassifier(model, name, unseen), features, expected, name, start=start, gradient=gradient)


def _behind(model: ImageClassifier, path: Path, name: str) -> tuple[str, Pooled] | None:
    """The convolution whose outputs, behind ReLU or also max pooling, are a layer's only input, by name; None else."""
    source, pooling = path.source.get(name), None
    if source and SoftPooling.fits(found := model.get_submodule(source)):
        source, pooling = path.source.get(source), found
    if source is None or type(model.get_submodule(source)) is not nn.ReLU:
        return None
    before = path.source.get(source)
    layer = before and model.get_submodule(before)
    return (before, Pooled(layer, pooling)) if type(layer) is nn.Conv2d else None


@contextmanager
def _instead(layer: nn.Module, maps: Tensor) -> Iterator[None]:
    """Let a layer get other inputs."""
    hook = layer.register_forward_pre_hook(lambda _, inputs: (maps,))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def _features_of(model: ImageClassifier, name: str, maps: Tensor, image_shape: ImageShape) -> Tensor:
    """(N, D) features of maps in front of a layer; where these also go elsewhere, as around a block, not theirs."""
    with _instead(model.get_submodule(name), maps):
        return model.embed(torch.full((len(maps), *image_shape), 0.5).to(maps))


@torch.no_grad()
def _sized_by_features(
    model: ImageClassifier, convolution: Convolution, found: Maps, known: Tensor, image_shape: ImageShape
) -> Tensor | None:
    """(N, D) maps in the order and size at which they have the known features (N, F); None where they have others."""
    read, name = found.maps.to(known), convolution.name
    alone = _features_of(model, name, torch.zeros_like(read), image_shape)  # of biases, which show no map
    known = known - alone
    fits = []
    for maps in (read,) if found.signed else (read, -read):
        shown = _features_of(model, name, maps, image_shape) - alone
        cosine = F.normalize(shown, dim=1) @ F.normalize(known, dim=1).T
        places, order = linear_sum_assignment(cosine.numpy(), maximize=True)
        maps = maps[torch.from_numpy(places)[torch.from_numpy(order).argsort()]]
        size = torch.ones(len(maps), 1, 1, 1).to(maps)
        for _ in range(ROUNDS):
            shown = _features_of(model, name, size * maps, image_shape) - alone
            size = size * (known.norm(dim=1) / shown.norm(dim=1).clamp_min(1e-12))[:, None, None, None]
        shown = _features_of(model, name, size * maps, image_shape) - alone
        off = ((shown - known).norm(dim=1) / known.norm(dim=1)).max().item()
        fits.append((off, (size * maps).flatten(1)))
    return _clear(fits)


@torch.no_grad()
def _sized_by_statistics(
    model: ImageClassifier, convolution: Convolution, found: Maps, known: Tensor, image_shape: ImageShape
) -> Tensor | None:
    """(1, D) a single image's map of the size at which its outputs have the variance that BatchNorm saw."""
    behind = model.get_submodule(convolution.behind)
    if not behind.track_running_stats:
        return None
    maps, weight = found.maps.to(known), convolution.layer.weight.to(known)
    spread = F.conv2d(maps, weight, stride=convolution.layer.stride, padding=convolution.layer.padding)
    spread = spread.std((2, 3), correction=0)[0]
    target = behind.running_var.to(spread).sqrt()
    size = (spread @ target) / spread.square().sum()
    if (size * spread - target).norm() > SAME_FEATURES * target.norm():
        return None
    if found.signed:
        return (size * maps).flatten(1)
    training, fits = behind.training, []
    with keeping_statistics(model):
        behind.train()  # by the map's own statistics, which are those of the image, what is unseen of it has no effect
        for turned in (size * maps, -size * maps):
            shown = _features_of(model, convolution.name, turned, image_shape)
            fits.append((((shown - known).norm() / known.norm()).item(), turned.flatten(1)))
        behind.train(training)
    return _clear(fits)


def _clear(fits: list[tuple[float, Tensor]]) -> Tensor | None:
    """Of maps of either sign with their distances to the features, those that fit; None where neither or both do."""
    (off, maps), *others = sorted(fits, key=lambda fit: fit[0])
    return maps if off <= SAME_FEATURES and all(other > CLEARER * off for other, _ in others) else None


class MapClassifier(ImageClassifier):
    """A model whose features are the input of one of its layers, without what is not seen of it.

    Args:
        model: the whole model.
        layer: name of the layer in it.
        unseen: (k, h, w) orthonormal; multiples of these are taken out of each channel.
    """

    def __init__(self, model: ImageClassifier, layer: str, unseen: Tensor) -> None:
        super().__init__(model.mean.flatten().tolist(), model.std.flatten().tolist())
        self.features = _Until(model.features, layer.removeprefix("features."), unseen.to(model.mean))
        self.head = model.head


class _Reached(Exception):
    """The layer was reached."""


class _Until(nn.Module):
    def __init__(self, whole: nn.Module, layer: str, unseen: Tensor) -> None:
        super().__init__()
        self.whole = whole
        self.layer = layer
        self.register_buffer("unseen", unseen.flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        inputs: list[Tensor] = []

        def stop(_: nn.Module, given: tuple[Tensor]) -> None:
            inputs.append(given[0])
            raise _Reached

        hook = self.whole.get_submodule(self.layer).register_forward_pre_hook(stop)
        try:
            self.whole(images)
        except _Reached:
            pass
        finally:
            hook.remove()
        maps = inputs[0]
        if not len(self.unseen):
            return maps
        flat = maps.flatten(2)
        return (flat - flat @ self.unseen.T @ self.unseen).view(maps.shape)
