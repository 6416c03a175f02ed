"""A decoder from features to images that is learned from public photographs for the observed weights."""

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attack_modules.diffusion.trained.photo_crops import Crops, content, image_paths, read_photograph
from attack_modules.feature_inversion.controls import mean_psnr
from attack_modules.priors import rgb_to_ycbcr
from attack_modules.simulation.feature_map import feature_map_shape
from attack_modules.threat_model.observed import RoundsSummary
from attack_modules.threat_model.requirements import Requirement
from fl_lightning.data.images import read_image
from fl_lightning.errors import SettingError
from fl_lightning.models import ImageClassifier, ImageShape
from fl_lightning.storage import load_checkpoint, save_checkpoint

HELD_OUT = 0.1
"""Share of the photographs, on which the ridge is chosen and the decoder is measured."""
FEWEST = 11
"""Fewest photographs: two are held out, since BatchNorm refuses a single image."""
MOST_HELD_OUT = 100
"""Most photographs that are held out."""
RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0, 100.0)
"""Candidates, in variances of a feature. Few crops need large ones, else known images come back worse than grey."""
MOST_INPUTS = 2560
"""Most features in a regression: those of the whole map if it has no more, else of a position and its neighbours."""
MOST_PLACES = 20000
"""Most positions of all crops together, where blocks are regressed."""
MOST_OUTPUTS = 12288
"""Most pixel values that are regressed at once. Beyond, images are decoded smaller: so few features show no more."""
LEAST_CROPS = 100
"""Fewest crops that a decoder is learned from."""
KEPT = 24
"""Held-out photographs that are kept as known images."""
CHUNK = 50
"""Images that are passed through the model at once."""
SAME = 1e-4
"""Share of a map's row that those before do not explain, up to which it is a copy; and spread of a feature, relative to
the largest one, up to which it is constant."""
VERSION = 2
"""Of the file."""


class LearnedDecoder:
    """A regression of images on features, learned from crops of public photographs.

    It takes what the linear start of `FeatureInversion` does not: features that are no map, or a map that does not
    divide the image, as of adaptive pooling, which holds copies. Where a model keeps few numbers of an image, most of
    what they tell is what photographs with such numbers look like; inversion cannot add it, and this start has it.

    The whole image is regressed on all distinct features where these are few, else blocks of it on those of a position
    and its neighbours. The ridge is chosen on photographs that were held out. The result is kept in a file for the
    model's weights, the photographs and these settings.

    Args:
        photographs: folders of public images, searched recursively. None of the peers' may be among them.
        crops: number of random crops that are passed through the model.
        reduction: largest factor by which a crop is reduced.
        cache: folder of the files.
        seed: of the crops.

    Raises:
        SettingError: no photographs, fewer than 100 crops, or a reduction below 1.
    """

    def __init__(
        self,
        photographs: list[Path],
        crops: int = 6000,
        reduction: float = 6.0,
        cache: Path = Path("runs/decoders"),
        seed: int = 0,
    ) -> None:
        if not photographs or crops < LEAST_CROPS or not 1 <= reduction < math.inf:
            raise SettingError(
                f"`decoder` needs folders of photographs, crops >= {LEAST_CROPS} and reduction >= 1, but got "
                f"photographs={[str(path) for path in photographs]}, crops={crops}, reduction={reduction}."
            )
        self.photographs = [Path(path) for path in photographs]
        self.crops = crops
        self.reduction = reduction
        self._files = Path(cache)  # no setting that a result depends on: `describe` leaves it out
        self.seed = seed

    def fitted(self, model: ImageClassifier, image_shape: ImageShape, noise: float = 0.0) -> "PhotographDecoder":
        """The decoder of a model's features, from its file where there is one.

        Args:
            model: whose features are meant.
            image_shape: (C, H, W) of the images.
            noise: of the features that will be decoded, relative to their size.

        Raises:
            MissingFile: a folder holds no images.
            SettingError: there are too few photographs, or one cannot be read or is smaller than the images.
            StorageError: the file cannot be written, or is damaged.
        """
        paths = self.paths()
        file = self._files / f"{self._key(paths, model, image_shape, noise)}.ckpt"
        if file.is_file():
            return PhotographDecoder(load_checkpoint(file)).to(model.mean)
        order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(self.seed)).tolist()
        held_out = min(math.ceil(HELD_OUT * len(paths)), MOST_HELD_OUT)
        known = [paths[index] for index in order[:held_out]]
        photographs = [read_photograph(paths[index]) for index in order[held_out:]]
        crops = Crops(photographs, max(image_shape[1:]), self.reduction, self.seed)
        known = _whole(known, image_shape)
        places = math.prod(Distinct.of(model, known[:CHUNK]).layout(image_shape).places)
        count = self.crops if places == 1 else min(self.crops, max(LEAST_CROPS, MOST_PLACES // places))
        state = learn(model, _cropped(crops, count, image_shape), known, noise)
        save_checkpoint(file, state)
        return PhotographDecoder(state).to(model.mean)

    def requirements(self) -> list[Requirement]:
        """Photographs, before any round is simulated."""
        return [PublicPhotographs(self)]

    def paths(self) -> list[Path]:
        """Of the photographs.

        Raises:
            MissingFile: a folder holds no images.
            SettingError: there are too few.
        """
        paths = [path for root in self.photographs for path in image_paths(root, "model.decoder.photographs")]
        if len(paths) < FEWEST:
            raise SettingError(
                f"`model.decoder.photographs` holds only {len(paths)}, but some are learned from and others measure "
                f"what was learned. Give folders of at least {FEWEST} photographs, better of hundreds."
            )
        return paths

    def _key(self, paths: list[Path], model: ImageClassifier, image_shape: ImageShape, noise: float) -> str:
        """What the decoder depends on, in 16 hexadecimal digits."""
        digest = hashlib.sha256()
        settings = VERSION, tuple(image_shape), self.crops, self.reduction, self.seed, f"{noise:.2g}"
        settings += (feature_map_shape(model, image_shape),)  # of several maps of the same weights
        digest.update(repr((settings, model.mean.tolist(), model.std.tolist(), type(model).__name__)).encode())
        for path in paths:
            digest.update(content(path))
        for name, tensor in model.features.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class PublicPhotographs(Requirement):
    """Enough photographs in the folders of a decoder, whatever the rounds are."""

    name = "public photographs"

    def __init__(self, decoder: LearnedDecoder) -> None:
        self.decoder = decoder

    def violation(self, rounds: RoundsSummary) -> str | None:
        self.decoder.paths()  # says itself what is missing
        return None


class PhotographDecoder(nn.Module):
    """Pixels as an affine function of features, see `LearnedDecoder`.

    Args:
        state: as `learn` returns it.

    Attributes:
        known: (K, C, H, W) held-out photographs in [0, 1].
        numbers: distinct features of an image that are not constant.
    """

    known: Tensor

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__()
        self.distinct = Distinct(tuple(state["map_shape"]), state["rows"], state["columns"])
        self.image_size = tuple(state["image_size"])
        self.layout = Layout(tuple(state["places"]), state["neighbourhood"], tuple(state["block"]))
        self.numbers = state["numbers"]
        for name in ("centre", "scale", "weight", "offset", "known"):
            self.register_buffer(name, state[name])

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """(N, D) features -> (N, C, H, W) images in [0, 1]."""
        return torch.cat([self._decode(chunk) for chunk in features.to(self.weight).split(CHUNK)])

    def _decode(self, features: Tensor) -> Tensor:
        around = self.layout.around(self.distinct.maps(features))
        return self.layout.images((around - self.centre) * self.scale @ self.weight + self.offset, self.image_size)


class Distinct(NamedTuple):
    """What of a feature map is no copy: adaptive pooling to a larger map makes copies, and means of neighbours."""

    map_shape: tuple[int, int, int]
    """(c, h, w) of the map."""
    rows: list[int]
    """That are no linear combinations of those before."""
    columns: list[int]
    """Likewise."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: ImageClassifier, images: Tensor) -> "Distinct":
        """As it shows on some images (N, C, H, W) uint8."""
        map_shape = feature_map_shape(model, tuple(images.shape[1:]))
        maps = model.embed(images.to(model.mean) / 255).unflatten(1, map_shape)
        return cls(map_shape, _independent(maps.transpose(1, 2)) or [0], _independent(maps.transpose(1, 3)) or [0])

    def maps(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, c, h', w')."""
        return features.unflatten(1, self.map_shape)[:, :, self.rows][:, :, :, self.columns]

    def layout(self, image_shape: ImageShape) -> "Layout":
        """Which pixels of images (C, H, W) are regressed on which of these features."""
        return Layout.of((self.map_shape[0], len(self.rows), len(self.columns)), image_shape)


class Layout(NamedTuple):
    """Which pixels are regressed on which features."""

    places: tuple[int, int]
    """(h, w) blocks of an image; (1, 1) for the whole image."""
    neighbourhood: int
    """Positions of a block's features in each direction; 0 for the whole map."""
    block: tuple[int, int]
    """(height, width) of a block in pixels."""

    @classmethod
    def of(cls, map_shape: tuple[int, ...], image_shape: ImageShape) -> "Layout":
        """For maps (c, h, w) of distinct features, and images (C, H, W)."""
        (channels, height, width), (colours, *size) = map_shape, image_shape
        whole = channels * height * width <= MOST_INPUTS
        places = (1, 1) if whole else (height, width)
        block = [math.ceil(side / count) for side, count in zip(size, places, strict=True)]
        smaller = min(1.0, math.sqrt(MOST_OUTPUTS / (colours * math.prod(block))))
        neighbourhood = 0 if whole else 3 if 9 * channels <= MOST_INPUTS else 1
        return cls(places, neighbourhood, (max(1, int(smaller * block[0])), max(1, int(smaller * block[1]))))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) at which images are decoded."""
        return self.places[0] * self.block[0], self.places[1] * self.block[1]

    def around(self, maps: Tensor) -> Tensor:
        """(N, c, h, w) -> (N, places, inputs) features at and around each block."""
        if not self.neighbourhood:
            return maps.flatten(1)[:, None]
        padded = F.pad(maps, [self.neighbourhood // 2] * 4, mode="replicate")
        return F.unfold(padded, self.neighbourhood).transpose(1, 2)

    def blocks(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, places, outputs) pixels of each block."""
        return F.unfold(_resized(images, self.size), self.block, stride=self.block).transpose(1, 2)

    def images(self, blocks: Tensor, size: tuple[int, int]) -> Tensor:
        """(N, places, outputs) -> (N, C, *size) in [0, 1]."""
        return _resized(F.fold(blocks.transpose(1, 2), self.size, self.block, stride=self.block), size).clamp(0, 1)


@torch.no_grad()
def learn(model: ImageClassifier, crops: Tensor, known: Tensor, noise: float) -> dict[str, Any]:
    """Regress images on their features.

    Args:
        model: whose features are meant.
        crops: (M, C, H, W) uint8, learned from.
        known: (K, C, H, W) uint8 photographs that were held out, on which the ridge is chosen.
        noise: of the features that will be decoded, relative to their size.

    Returns:
        The state of a `PhotographDecoder`: tensors and plain types.
    """
    distinct = Distinct.of(model, known[:CHUNK])
    layout = distinct.layout(tuple(crops.shape[1:]))

    def pairs(images: Tensor) -> tuple[Tensor, Tensor]:
        """(places of all images, inputs), and (the same, outputs)."""
        chunks = images.tensor_split(math.ceil(len(images) / CHUNK))  # evenly: BatchNorm refuses a single image
        around = [layout.around(distinct.maps(model.embed(chunk.to(model.mean) / 255))) for chunk in chunks]
        blocks = [layout.blocks(chunk.to(model.mean) / 255) for chunk in chunks]
        return torch.cat(around).flatten(0, 1), torch.cat(blocks).flatten(0, 1)

    inputs, outputs = pairs(crops)
    centre, spread, offset = inputs.mean(0), inputs.std(0), outputs.mean(0)
    varies = spread > SAME * inputs.abs().amax()
    scale = torch.where(varies, 1 / spread.clamp_min(torch.finfo(spread.dtype).tiny), 0)
    noisy = (noise * inputs.square().mean().sqrt() * scale).square()
    inputs, outputs = (inputs - centre) * scale, outputs - offset
    values, vectors = torch.linalg.eigh(inputs.T @ inputs / len(inputs) + noisy.diag())
    moments = vectors.T @ (inputs.T @ outputs / len(inputs))
    inputs, _ = pairs(known)
    inputs = (inputs - centre) * scale @ vectors

    def ridged(ridge: float) -> Tensor:
        return moments / (values.clamp_min(0) + ridge)[:, None]

    def quality(ridge: float) -> float:
        blocks = (inputs @ ridged(ridge) + offset).unflatten(0, (len(known), -1))
        return mean_psnr(layout.images(blocks, tuple(known.shape[2:])), known.to(model.mean) / 255)

    ridge = max(RIDGES, key=quality)
    per_place = layout.neighbourhood**2 or 1
    return {
        **layout._asdict(),
        **distinct._asdict(),
        "image_size": tuple(crops.shape[2:]),
        "numbers": int(varies.sum()) // per_place * math.prod(layout.places),
        "centre": centre,
        "scale": scale,
        "weight": vectors @ ridged(ridge),
        "offset": offset,
        "known": known[:KEPT].to(model.mean) / 255,
    }


def _independent(slices: Tensor) -> list[int]:
    """Indices of those of the slices of (N, n, ...) that are no linear combinations of those before."""
    found, basis = [], []
    for index, row in enumerate(slices.double().transpose(0, 1).flatten(1)):
        rest = row
        for other in basis:
            rest = rest - (rest @ other) * other
        if rest.norm() > SAME * row.norm():
            found.append(index)
            basis.append(rest / rest.norm())
    return found


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(images.shape[2:]) == tuple(size):
        return images
    return F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)


def _cropped(crops: Crops, count: int, image_shape: ImageShape) -> Tensor:
    """(count, C, H, W) uint8 crops; grey ones for grey images."""
    channels, height, width = image_shape
    images = []
    for index in range(count):
        crop = crops[index][:, :height, :width]
        images.append((255 * (crop if channels == 3 else rgb_to_ycbcr(crop[None])[0, :1])).round().byte())
    return torch.stack(images)


def _whole(paths: list[Path], image_shape: ImageShape) -> Tensor:
    """(K, C, H, W) uint8 photographs, cropped and resized as attacked images are."""
    channels, height, width = image_shape
    return torch.stack([read_image(path, max(height, width), channels)[:, :height, :width] for path in paths])
