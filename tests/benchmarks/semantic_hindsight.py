"""How well does semantic enhancement's stopping rule choose? What it kept, against the best step in hindsight.

    python tests/benchmarks/semantic_hindsight.py runs/semantic_demo/version_0 runs/semantic_demo/version_1 ...

takes runs of `configs/semantic_demo.yaml` with the images that the rule kept, repeats their searches to the last step
without stopping, and looks for the one step at which all images together turn out best against the originals.
"""

import csv
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from run_files import read_images, truth_of
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from attack_modules.attack import Reconstruction
from attack_modules.enhance.shortcuts import small_semantic
from attack_modules.evaluation.cifar10_classifier import Cifar10Recogniser
from fl_lightning.truth import Truth


class Score(NamedTuple):
    """Of several images; the truth is used."""

    ssim: float
    recognised: float

    @classmethod
    def of(cls, images: Tensor, truth: Truth, recogniser: Cifar10Recogniser) -> "Score":
        recognised = recogniser(images, truth.labels)[0].float().mean()
        return cls(ssim(images, truth.images, data_range=1.0).item(), recognised.item())

    def __str__(self) -> str:
        return f"SSIM {self.ssim:.3f}, recognised {self.recognised:.1%}"


def without_stopping(reconstruction: Reconstruction, seed: int) -> tuple[list[Tensor], list[float]]:
    """All images, and their mean pixel loss, at every step of the demo's search."""
    enhancer = small_semantic()
    enhancer.patience = enhancer.max_steps
    search = enhancer.search(reconstruction, seed)
    search.tolerance.zero_()
    optimizer = torch.optim.Adam([search.noise], lr=enhancer.lr)
    samples, losses = [], []
    for _ in range(enhancer.max_steps):
        loss, found = search.step()
        samples.append(found.images)
        losses.append(found.pixel_loss.mean().item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return samples, losses


def hindsight(run: Path, recogniser: Cifar10Recogniser) -> tuple[Score, Score, list[Score]]:
    """Scores of the raw reconstructions, of what the rule kept, and of every step."""
    results = json.loads((run / "results.json").read_text())
    truth = truth_of(run)
    rows = list(csv.DictReader((run / "per_image.csv").open()))
    raw = read_images(run / "images", rows)
    labels = torch.tensor([int(row["inferred_label"]) for row in rows])
    numbers = torch.tensor([int(row["reconstruction"]) for row in rows])
    samples, losses = without_stopping(Reconstruction(raw, labels, 4, indices=numbers), results["seed"])
    by_step = [Score.of(images, truth, recogniser) for images in samples]
    kept = Score.of(read_images(run / "enhanced", rows), truth, recogniser)
    print(f"\n{run}: raw {Score.of(raw, truth, recogniser)}; the rule kept {kept}")
    for step, (loss, score) in enumerate(zip(losses, by_step, strict=True)):
        print(f"  step {step:2d}: pixel loss {loss:.4f}, {score}")
    return Score.of(raw, truth, recogniser), kept, by_step


def mean(scores: list[Score]) -> Score:
    """Of runs with as many images each."""
    return Score(*torch.tensor(scores).mean(0).tolist())


def compare(kept: Score, by_step: list[Score]) -> None:
    """Print the best steps in hindsight, and what the rule kept of them."""
    most = max(score.ssim for score in by_step)
    alike = [score for score in by_step if score.ssim >= 0.9 * most]
    for measure, among, scores in (
        ("ssim", "all steps", by_step),
        ("recognised", "all steps", by_step),
        ("recognised", "the steps whose SSIM is within 10 % of the best", alike),
    ):
        best = max(scores, key=lambda score: getattr(score, measure))
        share = getattr(kept, measure) / getattr(best, measure)
        print(f"best {measure} of {among}, step {by_step.index(best)}: {best}; the rule kept {share:.1%} of it")


if __name__ == "__main__":
    found = [hindsight(Path(run), Cifar10Recogniser()) for run in sys.argv[1:]]
    raw, kept = (mean([scores[index] for scores in found]) for index in (0, 1))
    print(f"\n{len(found)} run(s) together: raw {raw}; the rule kept {kept}")
    compare(kept, [mean(list(scores)) for scores in zip(*(scores[2] for scores in found), strict=True)])
