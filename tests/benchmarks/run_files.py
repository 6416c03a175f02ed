"""What the scripts of this folder read of a run's directory."""

import json
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import read_image

from fl_lightning.truth import Truth


def truth_of(run: Path) -> Truth:
    """What the run's images are compared with."""
    observation = Path(json.loads((run / "results.json").read_text())["observation"])
    return Truth.load(next((observation / "truth").glob("*.json")).with_suffix(""))


def read_images(folder: Path, rows: list[dict[str, str]]) -> Tensor:
    """(N, C, H, W) in [0, 1], a folder's images in the order of these rows of `per_image.csv`."""
    return torch.stack([read_image(folder / f"{int(row['reconstruction']):03d}.png") for row in rows]) / 255
