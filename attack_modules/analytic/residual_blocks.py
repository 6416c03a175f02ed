"""The maps in front of a residual block from those behind it, the errors there, and the block's update.

In front of a convolution whose outputs' errors `D` are known, its gradient `D^T X` is linear in its input maps `X`,
with the same matrix for each channel: out * k * k equations for N h w unknowns. Errors pass BatchNorm in train mode
only given its normalised outputs, which the maps give: both are found in turn. They pass a ReLU where its outputs are
positive; of outputs too small to tell, the gradient decides, by regression on the maps (`_regressed`).

So the second convolution of a block (torchvision's `BasicBlock`) gives the maps between the convolutions, and a first
one of stride 1 those in front of the block. At stride 2 the equations do not suffice; but outputs of the convolution
and of the shortcut's are known as well, where ReLU let them pass, and all of it is matched by L-BFGS. Going on with the
errors in front of the block, and the block before, is the recursion of R-GAP (Zhu and Blaschko 2021, arXiv 2010.07733)
for several images, through BatchNorm. Neither labels nor rates are used.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight
from torchvision.models.resnet import BasicBlock

DETERMINED = 1.1
"""Equations of a channel over its unknowns, from which the maps in front of a second convolution are read."""
POSITIVE = 1e-3
"""Entry over the mean one, from which it is taken as passed by ReLU at first."""
SMALL = 0.1
"""The same, up to which the gradient decides that."""
TOLD = 0.05
"""Error over the mean size of all, from which the gradient tells whether ReLU passed it."""
ROUNDS = 8
"""Most decisions."""
ITERATIONS = 6
"""Of maps and normalised outputs in turn."""
EVALUATIONS = 400
"""Of L-BFGS each time."""
RIDGE = 1e-10
"""Of the linear equations, relative."""
READ = 0.05
"""Share of the gradients that is unexplained, up to which maps count as read. Measured: 0.0001 to 0.015."""


class BlockMaps(NamedTuple):
    """The maps at one end of a block.

    Attributes:
        maps: (N, c, h, w), of one peer after the other.
        errors: (N, c, h, w) derivative of the aggregated loss by these.
        residual: share of the block's gradients that is unexplained.
    """

    maps: Tensor
    errors: Tensor
    residual: float


class PeersBatches:
    """Means over each peer's images.

    Args:
        sizes: numbers of images, one peer after the other.
    """

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def mean(self, maps: Tensor) -> Tensor:
        """(N, c, 1, 1) mean over the images and positions of an image's peer."""
        parts = maps.split(self.sizes)
        return torch.cat([part.mean((0, 2, 3), keepdim=True).expand(len(part), -1, 1, 1) for part in parts])

    def normalised(self, maps: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        """What BatchNorm makes of maps before its weight and bias, and (N, c, 1, 1) what it divides by."""
        centred = maps - self.mean(maps)
        spread = (self.mean(centred.square()) + norm.eps).sqrt()
        return centred / spread, spread

    def variance(self, maps: Tensor) -> Tensor:
        """(c, peers) the samples' variance of each peer, times its share of the images."""
        parts = [part.transpose(0, 1).flatten(1) for part in maps.split(self.sizes)]
        return torch.stack([part.var(1) * size for part, size in zip(parts, self.sizes, strict=True)], 1) / len(maps)

    def sized(self, maps: Tensor, outputs: Tensor, variance: Tensor) -> Tensor:
        """Maps of which the outputs of a convolution have this variance (c,) on average, by a factor for each peer."""
        relative = self.variance(outputs) / variance[:, None]
        squares = torch.linalg.lstsq(relative, torch.ones_like(variance)[:, None]).solution.flatten()
        factor = squares.clamp_min(torch.finfo(squares.dtype).eps).sqrt()
        return maps * factor.repeat_interleave(torch.tensor(self.sizes))[:, None, None, None]

    def behind(self, errors: Tensor, norm: nn.BatchNorm2d, normalised: Tensor, spread: Tensor) -> Tensor:
        """Errors in front of BatchNorm from those behind it."""
        along = normalised * self.mean(errors * normalised)
        return norm.weight[:, None, None] / spread * (errors - self.mean(errors) - along)


class _Layer(NamedTuple):
    """A convolution, the BatchNorm behind it, and what the update shows of them."""

    convolution: nn.Conv2d
    norm: nn.BatchNorm2d
    gradient: Tensor
    variance: Tensor

    def outputs(self, maps: Tensor) -> Tensor:
        return self.convolution(maps)

    @property
    def geometry(self) -> dict[str, tuple[int, ...]]:
        return {"stride": self.convolution.stride, "padding": self.convolution.padding}

    def weight_gradient(self, maps: Tensor, errors: Tensor) -> Tensor:
        return conv2d_weight(maps, self.gradient.shape, errors, **self.geometry)

    def input_errors(self, like: Tensor, errors: Tensor) -> Tensor:
        return conv2d_input(like.shape, self.convolution.weight, errors, **self.geometry)


def errors_before(layer: nn.Conv2d, maps: Tensor, gradient: Tensor) -> Tensor | None:
    """(N, c, h, w) a convolution's share of the errors in front of it, from its gradient and its input maps.

    None where there are more patches than a patch has entries: errors behind it are not unique then.
    """
    patches = F.unfold(maps, layer.kernel_size, padding=layer.padding, stride=layer.stride)
    if patches[:, 0].numel() > patches.shape[1]:
        return None
    behind = _regressed(patches, gradient)
    side = [
        (size + 2 * pad - kernel) // stride + 1
        for size, pad, kernel, stride in zip(
            maps.shape[2:], layer.padding, layer.kernel_size, layer.stride, strict=True
        )
    ]
    behind = behind.unflatten(2, side)
    return conv2d_input(maps.shape, layer.weight, behind, stride=layer.stride, padding=layer.padding)


def linear_maps(layer: nn.Conv2d, gradient: Tensor, errors: Tensor) -> Tensor:
    """(N, c, h, w) the maps in front of a convolution of stride 1, by least squares of its gradient.

    Args:
        layer: the convolution, whose weights are not used.
        gradient: (out, c, kh, kw) of its weight.
        errors: (N, out, h, w) behind it.
    """
    number, _, height, width = errors.shape
    single = torch.eye(height * width).to(errors).view(-1, 1, height, width)
    places = F.unfold(single, layer.kernel_size, padding=layer.padding)
    design = torch.einsum("nop,qtp->otnq", errors.flatten(2), places).flatten(0, 1).flatten(1).double()
    right = gradient.permute(0, 2, 3, 1).flatten(0, 2).double()
    gram = design.T @ design
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    found = torch.linalg.solve(gram, design.T @ right).view(number, height, width, -1)
    return found.permute(0, 3, 1, 2).to(errors)


def _regressed(patches: Tensor, gradient: Tensor) -> Tensor:
    """(N, out, P) errors behind a convolution, by least squares of its gradient on the patches (N, entries, P)."""
    rows = patches.transpose(1, 2).flatten(0, 1).double()
    found = torch.linalg.lstsq(rows.T, gradient.flatten(1).T.double()).solution
    return found.to(patches).view(len(patches), -1, len(gradient)).transpose(1, 2)


def reads(block: nn.Module, maps: Tensor) -> bool:
    """Whether a block is of the kind that is read, and has enough equations for the maps (N, c, h, w) behind it."""
    if not isinstance(block, BasicBlock):
        return False
    second = block.conv2
    equations = second.out_channels * second.kernel_size[0] * second.kernel_size[1]
    return equations >= DETERMINED * maps[:, 0].numel()


@torch.no_grad()
def maps_before(
    block: BasicBlock,
    behind: BlockMaps,
    gradients: Mapping[str, Tensor],
    variances: Mapping[str, Tensor],
    sizes: list[int],
    shape: tuple[int, int, int],
) -> BlockMaps:
    """The maps in front of a block that `reads` those behind it.

    Args:
        block: with the weights under which the gradients were taken.
        behind: maps and errors behind it.
        gradients: of the aggregated loss, by name of the block's parameters.
        variances: (c,) mean over the peers' batches of the samples' variance of its inputs, by name of the block's
            BatchNorm layers.
        sizes: of the peers' batches.
        shape: (c, h, w) of the maps in front.
    """
    batches = PeersBatches(sizes)

    def layer(convolution: str, norm: str) -> _Layer:
        modules = block.get_submodule(convolution), block.get_submodule(norm)
        return _Layer(*modules, gradients[f"{convolution}.weight"], variances[norm])

    first, second = layer("conv1", "bn1"), layer("conv2", "bn2")
    inner, errors, passed, residual = _read_stride_1(second, behind.maps, behind.errors, batches)
    inner_errors, sum_errors = second.input_errors(inner, errors), behind.errors * passed
    if block.downsample is None:
        maps, errors, _, unexplained = _read_stride_1(first, inner, inner_errors, batches)
        before = first.input_errors(maps, errors) + sum_errors
    else:
        outputs = _affine(batches.normalised(second.outputs(inner), second.norm)[0], second.norm)
        shortcut = layer("downsample.0", "downsample.1")
        search = _Search(
            first, shortcut, inner, inner_errors, sum_errors, passed, outputs, behind.maps - outputs, batches
        )
        maps, before, unexplained = search.run(shape)
    return BlockMaps(maps, before, max(unexplained, residual))  # in this order, NaN stays


def _affine(normalised: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    return normalised * norm.weight[:, None, None] + norm.bias[:, None, None]


def _read_stride_1(
    layer: _Layer, maps: Tensor, errors: Tensor, batches: PeersBatches
) -> tuple[Tensor, Tensor, Tensor, float]:
    """The maps in front of a convolution of stride 1, the errors behind it, what ReLU let pass, and the residual.

    Args:
        layer: the convolution.
        maps: (N, c, h, w) behind the ReLU that follows, of which the layer's outputs may be a part.
        errors: there.
        batches: of the peers.
    """
    passed, normalised = maps > POSITIVE * maps.mean(), torch.zeros_like(maps)
    spread = (layer.variance + layer.norm.eps).sqrt()[:, None, None].expand_as(maps)
    best: tuple[Tensor, Tensor, Tensor, float] | None = None
    for _ in range(ROUNDS):
        for _ in range(ITERATIONS):
            outer = batches.behind(errors * passed, layer.norm, normalised, spread)
            found = linear_maps(layer.convolution, layer.gradient, outer).relu()
            found = batches.sized(found, layer.outputs(found), layer.variance)
            normalised, spread = batches.normalised(layer.outputs(found), layer.norm)
        off = layer.weight_gradient(found, outer) - layer.gradient
        residual = (off.norm() / layer.gradient.norm()).item()
        if best is None or residual < best[3]:
            best = found, outer, passed, residual
        decided = _decided(layer, found, maps, errors, passed, normalised, spread, batches)
        if decided.equal(passed):
            break
        passed = decided
    return best


def _decided(
    layer: _Layer,
    maps: Tensor,
    outputs: Tensor,
    errors: Tensor,
    passed: Tensor,
    normalised: Tensor,
    spread: Tensor,
    batches: PeersBatches,
) -> Tensor:
    """Which outputs ReLU let pass, where these are too small to tell, by the errors that the update shows.

    Args:
        layer: in front of the ReLU.
        maps: in front of the layer.
        outputs: of the ReLU.
        errors: behind the ReLU.
        passed: which were taken as passed.
        normalised: outputs of BatchNorm before its weight and bias.
        spread: what it divides by.
        batches: of the peers.
    """
    patches = F.unfold(maps, layer.convolution.kernel_size, **layer.geometry)
    if patches[:, 0].numel() > patches.shape[1]:
        return passed
    shown = _regressed(patches, layer.gradient).view_as(outputs)
    taken = errors * passed
    before = shown * spread / layer.norm.weight[:, None, None]
    before = before + batches.mean(taken) + normalised * batches.mean(taken * normalised)
    told = (outputs < SMALL * outputs.mean()) & (errors.abs() > TOLD * errors.abs().mean())
    return torch.where(told, before / errors > 0.5, passed)


class _Search:
    """The maps in front of a block's first convolution, and its shortcut."""

    def __init__(
        self,
        first: _Layer,
        shortcut: _Layer,
        inner: Tensor,
        inner_errors: Tensor,
        sum_errors: Tensor,
        sum_passed: Tensor,
        outputs: Tensor,
        rest: Tensor,
        batches: PeersBatches,
    ) -> None:
        self.first, self.shortcut, self.batches = first, shortcut, batches
        self.inner, self.inner_errors = inner, inner_errors
        self.sum_errors, self.sum_passed = sum_errors, sum_passed
        self.outputs, self.rest = outputs, rest
        self.passed = inner > POSITIVE * inner.mean()

    def run(self, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, float]:
        """Maps (N, c, h, w), the errors in front of the block, and the residual."""
        maps = torch.rand(len(self.inner), *shape, generator=torch.Generator().manual_seed(0)).to(self.inner)
        maps = self.batches.sized(maps, self.first.outputs(maps), self.first.variance)
        best: tuple[Tensor, Tensor, float] | None = None
        with Progress(transient=True) as progress:
            task = progress.add_task("Maps in front of a block", total=ROUNDS * EVALUATIONS)
            for _ in range(ROUNDS):
                maps = self._descend(maps, lambda: progress.advance(task))
                first_errors, other, residual = self._explained(maps)
                before = self.first.input_errors(maps, first_errors) + self.shortcut.input_errors(maps, other)
                if best is None or residual < best[2]:
                    best = maps.relu(), before, residual
                normalised, spread = self.batches.normalised(self.first.outputs(maps), self.first.norm)
                state = self.inner, self.inner_errors, self.passed, normalised, spread
                decided = _decided(self.first, maps, *state, self.batches)
                if decided.equal(self.passed):
                    break
                self.passed = decided
        return best

    def _descend(self, maps: Tensor, evaluated: Callable[[], None]) -> Tensor:
        """Maps with a lower loss, which calls `evaluated` each time that it takes the loss."""
        with torch.enable_grad():
            maps = maps.clone().requires_grad_()
            optimizer = torch.optim.LBFGS(
                [maps],
                max_iter=EVALUATIONS,
                max_eval=EVALUATIONS,
                history_size=20,
                line_search_fn="strong_wolfe",
                tolerance_grad=0,
                tolerance_change=0,
            )

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = sum(self._losses(maps)).log()
                loss.backward(inputs=[maps])
                evaluated()
                return loss

            optimizer.step(closure)
        return maps.detach()

    def _errors(self, layer: _Layer, maps: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
        """Errors in front of BatchNorm, and its outputs."""
        normalised, spread = self.batches.normalised(layer.outputs(maps), layer.norm)
        return self.batches.behind(errors, layer.norm, normalised, spread), _affine(normalised, layer.norm)

    def _losses(self, maps: Tensor) -> list[Tensor]:
        """Relative squared distances to all that is known."""
        errors, outputs = self._errors(self.first, maps, self.inner_errors * self.passed)
        others, other = self._errors(self.shortcut, maps, self.sum_errors)
        pairs = (self.first, errors), (self.shortcut, others)
        off = torch.where(self.sum_passed, other - self.rest, (other + self.outputs).relu())
        return [
            _share(torch.where(self.passed, outputs - self.inner, outputs.relu()), self.inner),
            _share(off, self.rest * self.sum_passed),
            _share(maps.clamp_max(0), maps.detach()),
            *(_share(layer.weight_gradient(maps, e) - layer.gradient, layer.gradient) for layer, e in pairs),
            *(self._variance(layer, maps) for layer, _ in pairs),
        ]

    def _variance(self, layer: _Layer, maps: Tensor) -> Tensor:
        found = self.batches.variance(layer.outputs(maps)).sum(1)
        return (found / layer.variance - 1).square().mean()

    def _explained(self, maps: Tensor) -> tuple[Tensor, Tensor, float]:
        """Errors behind the first convolution and behind the shortcut's, and the share of gradients not explained."""
        errors, _ = self._errors(self.first, maps, self.inner_errors * self.passed)
        others, _ = self._errors(self.shortcut, maps, self.sum_errors)
        pairs = (self.first, errors), (self.shortcut, others)
        shares = [_share(layer.weight_gradient(maps, e) - layer.gradient, layer.gradient) for layer, e in pairs]
        return errors, others, max(shares).sqrt().item()


def _share(off: Tensor, of: Tensor) -> Tensor:
    return off.square().sum() / of.square().sum()
