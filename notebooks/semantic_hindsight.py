"""How well does semantic enhancement's stopping rule choose? Its step against the best one in hindsight.

    python notebooks/semantic_hindsight.py runs/semantic_demo/version_0

takes a run's reconstructions and the labels that it inferred, searches all steps without stopping, and compares what
the rule would have kept, image by image, with the one step for all images that turns out best against the originals.
"""

import csv
import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure as ssim
from torchvision.io import read_image

from attack_modules.attack import Reconstruction
from attack_modules.cifar10_classifier import Cifar10Recogniser
from attack_modules.diffusion.small import TrainedConditional
from attack_modules.enhance.semantic import SemanticEnhancer, Step
from fl_lightning.truth import Truth


def hindsight(run: Path, enhancer: SemanticEnhancer, patience: int) -> dict[str, object]:
    """SSIM and recognition by step, at the step that the rule keeps, and of the raw reconstructions."""
    results = json.loads((run / "results.json").read_text())
    truth = Truth.load(next(Path(results["observation"], "truth").glob("*.json")).with_suffix(""))
    rows = list(csv.DictReader((run / "per_image.csv").open()))
    raw = torch.stack([read_image(run / "images" / f"{int(row['reconstruction']):03d}.png") for row in rows]) / 255
    labels = torch.tensor([int(row["inferred_label"]) for row in rows])
    factor = 4 if results["attack"] == "GradientInversion" else 1

    samples: list[Tensor] = []
    scores: list[Tensor] = []
    losses: list[float] = []

    def watch(step: int, indices: Tensor, found: Step) -> None:
        samples.append(found.images)
        scores.append(found.score)
        losses.append(found.pixel_loss.mean().item())

    enhancer.watch, enhancer.patience, enhancer.chunk_size = watch, 10**6, len(raw)
    enhancer.enhance(Reconstruction(raw, labels, factor), seed=results["seed"])
    recogniser = Cifar10Recogniser()

    def measured(images: Tensor) -> tuple[float, float]:
        similarity = ssim(images, truth.images, data_range=1.0).item()
        return round(similarity, 4), round(recogniser(images, truth.labels)[0].float().mean().item(), 4)

    kept, best, last = samples[0].clone(), scores[0].clone(), torch.zeros(len(raw), dtype=torch.long)
    for step in range(1, len(samples)):
        if (step - 1 - last > patience).all():
            break
        better = scores[step] < (1 - enhancer.margin) * best
        kept[better], best[better], last[better] = samples[step][better], scores[step][better], step
    by_step = [measured(images) for images in samples]
    return {
        "pixel loss by step": [round(loss, 5) for loss in losses],
        "steps kept": last.tolist(),
        "raw SSIM, recognised": measured(raw),
        "kept SSIM, recognised": measured(kept),
        "best SSIM in hindsight": max(by_step, key=lambda pair: pair[0]),
        "best recognised in hindsight": max(by_step, key=lambda pair: pair[1]),
        "by step": by_step,
    }


if __name__ == "__main__":
    search = SemanticEnhancer(TrainedConditional(), lr=0.05, timesteps=25, steps=60, starts=8)
    for name, value in hindsight(Path(sys.argv[1]), search, patience=10).items():
        print(f"{name}: {value}")
