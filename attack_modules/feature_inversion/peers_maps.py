"""Maps of several peers' images in front of BatchNorm in train mode, made whole, and followed back block by block."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchvision.models.resnet import BasicBlock

from attack_modules.analytic.convolution_maps import Convolution, Maps, unseen_maps
from attack_modules.analytic.residual_blocks import READ, BlockMaps, PeersBatches, errors_before, maps_before, reads
from attack_modules.feature_inversion.batch_statistics import by_peers
from fl_lightning.models import ImageClassifier, ImageShape
from fl_lightning.models.freezing import keeping_statistics

SAME_FEATURES = 0.1
"""Relative distance of a map's features to those that the head shows, up to which they are of one image."""

SAME_LEAST = 0.01
"""Distance of two images' least entries in a channel, over the maps' standard deviation, up to which both are 0."""


class PeersMaps(NamedTuple):
    """Maps in front of a convolution of all images, of one peer after the other.

    Attributes:
        model: whose BatchNorm layers normalise each peer's images by themselves; of a single peer, by its statistics.
        convolution: the maps are in front of it.
        maps: (N, c, h, w) without what is `unseen`.
        unseen: (k, h, w) orthonormal; multiples of these in each channel are not known.
        uncertainty: expected relative error.
        order: (N,) long, which of the head's images they are.
        peers: (N,) long.
    """

    model: ImageClassifier
    convolution: Convolution
    maps: Tensor
    unseen: Tensor
    uncertainty: float
    order: Tensor
    peers: Tensor


class Path:
    """How maps pass through a model: which module's outputs are the inputs of which.

    Args:
        model: with BatchNorm frozen.
        image_shape: (C, H, W).
    """

    @torch.no_grad()
    def __init__(self, model: ImageClassifier, image_shape: ImageShape) -> None:
        self.source: dict[str, str] = {}
        """Whose output the only input of a module is, by the latter's name: a `BasicBlock`, else the outermost one.

        Modules that are called several times, as a block's ReLU is, are left out: no single output is theirs."""
        self.shape: dict[str, tuple[int, ...]] = {}
        """(c, h, w) of that input."""
        made: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept, so that no other one gets the same id
        calls: Counter[str] = Counter()

        def before(name: str) -> Any:
            def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
                if len(inputs) == 1 and isinstance(inputs[0], Tensor) and inputs[0].ndim == 4:
                    self.shape[name] = tuple(inputs[0].shape[1:])
                    if id(inputs[0]) in made:
                        self.source[name] = made[id(inputs[0])][0]

            return note

        def behind(name: str) -> Any:
            def note(_: nn.Module, __: Any, output: Any) -> None:
                maker = made[id(output)][0] if id(output) in made else ""
                if isinstance(output, Tensor) and not isinstance(model.get_submodule(maker), BasicBlock):
                    made[id(output)] = name, output

            return note

        def counting(name: str) -> Any:
            return lambda *_: calls.update([name])

        def watched(hooks: list[RemovableHandle]) -> None:
            with keeping_statistics(model):
                model.embed(torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0)).to(model.mean))
            for hook in hooks:
                hook.remove()

        modules = [(name, module) for name, module in model.named_modules() if name.startswith("features.")]
        watched([module.register_forward_hook(counting(name)) for name, module in modules])
        single = [(name, module) for name, module in modules if calls[name] == 1]
        hooks = [module.register_forward_pre_hook(before(name)) for name, module in single]
        watched(hooks + [module.register_forward_hook(behind(name)) for name, module in single])


@contextmanager
def _giving(module: nn.Module, maps: Tensor) -> Iterator[None]:
    """Let a module have other outputs."""
    hook = module.register_forward_hook(lambda *_: maps.clone())  # an activation in place may follow
    try:
        yield
    finally:
        hook.remove()


def read_back(
    model: ImageClassifier,
    convolution: Convolution,
    found: Maps,
    update: Mapping[str, Tensor],
    features: Tensor,
    image_shape: ImageShape,
    batch_norm: frozenset[str],
) -> PeersMaps | None:
    """The earliest maps that follow from those in front of a convolution; None where these contradict the head.

    Args:
        model: under which the step was taken; its BatchNorm frozen at the means of the peers' statistics.
        convolution: in front of a BatchNorm layer.
        found: its input maps, with their peers.
        update: of a single local step, by parameter name.
        features: (N, D) that the head shows.
        image_shape: (C, H, W).
        batch_norm: names of the layers that normalised by their batch's statistics.
    """
    path = Path(model, image_shape)
    source = path.source.get(convolution.name)
    if source is None:
        return None
    peers, by_peer = found.peers.sort(stable=True)
    sizes = peers.bincount().tolist()
    batches, whole = PeersBatches(sizes), by_peers(model, batch_norm, sizes)
    maps, unseen = found.maps[by_peer].to(model.mean), found.unseen.to(model.mean)

    def variance(name: str, positions: int) -> Tensor:
        values = positions * len(maps)  # which the frozen statistics were divided by
        return model.get_submodule(name).running_var * values / (values - 1)

    with torch.no_grad():
        maps = batches.sized(maps, convolution.layer(maps), variance(convolution.behind, convolution.positions))
        maps = _filled(maps, unseen, sizes) if convolution.positive and len(unseen) == 1 else maps
    if (order := _order(whole, source, maps, features, image_shape)) is None:
        return None
    uncertainty, errors = found.uncertainty, _errors(model, path, source, maps, update)
    while (
        errors is not None
        and convolution.positive
        and len(unseen) <= 1
        and reads(block := model.get_submodule(source), maps)
    ):
        prefix, positions = f"{source}.", maps[0, 0].numel()
        own = {n.removeprefix(prefix): gradient for n, gradient in update.items() if n.startswith(prefix)}
        norms = [name.removeprefix(prefix) for name in batch_norm if name.startswith(prefix)]
        variances = {name: variance(prefix + name, positions) for name in norms}
        first, shape = f"{source}.conv1", path.shape[source]
        if len(norms) < (2 if block.downsample is None else 3):
            break
        try:
            before = maps_before(block, BlockMaps(maps, errors, uncertainty), own, variances, sizes, shape)
        except torch.linalg.LinAlgError:  # as behind a BatchNorm of weight 0, with which residual networks often begin
            break
        if not before.residual <= READ:  # nor NaN
            break
        convolution = Convolution(first, block.conv1, shape, f"{source}.bn1")
        unseen = unseen_maps(convolution)[: block.downsample is not None].to(maps)
        maps = _filled(before.maps, unseen, sizes) if len(unseen) else before.maps
        errors, uncertainty = before.errors, before.residual
        if source not in path.source:
            break
        source = path.source[source]
    flat, across = maps.flatten(2), unseen.flatten(1)
    maps = (flat - flat @ across.T @ across).view_as(maps)
    known = model if len(sizes) == 1 else whole  # the mean of one peer's statistics is its own
    return PeersMaps(known, convolution, maps, unseen, uncertainty, order, peers)


def _filled(maps: Tensor, unseen: Tensor, sizes: list[int]) -> Tensor:
    """Maps behind a ReLU with what is unseen of them: as much for each peer and channel that the least entry is 0."""
    pixels = unseen[0].abs() > unseen[0].abs().max() / 2
    parts = []
    for part in maps.split(sizes):
        own = part[:, :, pixels].amin(2)  # (n, c), more exact where this image has a zero there
        least = own.amin(0).expand_as(own)
        constant = torch.where(own - least < SAME_LEAST * part.std(), own, least)
        parts.append(part - constant[:, :, None, None] * pixels)
    return torch.cat(parts)


@torch.no_grad()
def _order(
    model: ImageClassifier, source: str, maps: Tensor, features: Tensor, image_shape: ImageShape
) -> Tensor | None:
    """(N,) which of the head's images the outputs (N, c, h, w) of a module are of; None if they are of others."""
    try:
        with _giving(model.get_submodule(source), maps):
            shown = model.embed(torch.full((len(maps), *image_shape), 0.5).to(maps))
    except ValueError:  # BatchNorm refuses a single value, so that no peer trained on such an image alone
        return None
    distances = torch.cdist(shown.double(), features.double()) / features.double().norm(dim=1)
    if not distances.isfinite().all():  # of maps read from what is no single step
        return None
    places, order = linear_sum_assignment(distances.numpy())
    return None if distances[places, order].max() > SAME_FEATURES else torch.from_numpy(order)


def _errors(
    model: ImageClassifier, path: Path, source: str, maps: Tensor, update: Mapping[str, Tensor]
) -> Tensor | None:
    """(N, c, h, w) derivative of the loss by a module's outputs, as large as the update; None where it is not shown.

    Errors behind the convolutions that take these follow from their updates, given the maps, without what is behind.
    """
    names = [name for name, given in path.source.items() if given == source]
    takers = [model.get_submodule(name) for name in names]
    if any(isinstance(taker, BasicBlock) and taker.downsample is None for taker in takers):
        return None  # a shortcut takes them too
    pairs = [(name, taker) for name, taker in zip(names, takers, strict=True) if isinstance(taker, nn.Conv2d)]
    shares = [errors_before(layer, maps, update[f"{name}.weight"]) for name, layer in pairs]
    return None if any(share is None for share in shares) else sum(shares)
