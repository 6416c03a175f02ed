"""Several attacks on the same images in one picture.

    python tests/benchmarks/side_by_side.py PICTURE.png matching=runs/inversion/version_0 closed=runs/demo/version_0

draws the originals, and below them what each run made of them, with its PSNR; with `--first 12`, of the first twelve.
"""

import csv
from argparse import ArgumentParser
from pathlib import Path

import torch
from run_files import read_images, truth_of
from torch import Tensor

from attack_modules.panels import draw_panel
from fl_lightning.errors import SettingError


def reconstructions(run: Path) -> tuple[Tensor, list[str]]:
    """(N, C, H, W) in the originals' order, and the PSNR of each."""
    rows = sorted(csv.DictReader((run / "per_image.csv").open()), key=lambda row: int(row["original"]))
    return read_images(run / "images", rows), [f"{float(row['psnr']):.1f}" for row in rows]


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--first", type=int, help="so many of the originals, in their order")
    arguments = parser.parse_args()
    runs = {name: Path(run) for name, run in (argument.split("=", 1) for argument in arguments.runs)}
    originals = [truth_of(run).images for run in runs.values()]
    if any(not torch.equal(images, originals[0]) for images in originals):
        raise SettingError("These runs are of different images. Name runs of one dataset with one seed.")
    found = {name: reconstructions(run) for name, run in runs.items()}
    captions = [f"{' / '.join(psnrs)} dB" for psnrs in zip(*(psnrs for _, psnrs in found.values()), strict=True)]
    rows = {"original": originals[0]} | {name: images for name, (images, _) in found.items()}
    shown = {name: images[: arguments.first] for name, images in rows.items()}
    draw_panel(shown, captions[: arguments.first]).save(arguments.picture)
