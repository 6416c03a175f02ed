"""Studies whose runs are made up: each writes what a run leaves, within milliseconds."""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
import torch

from attack_modules.analytic.typical_head import pink_noise
from attack_modules.audit.study import Cell, Defence, Scenario, Study
from attack_modules.audit.workers import Run
from attack_modules.panels import save_images
from fl_lightning.client import LocalTraining
from fl_lightning.record import Record
from fl_lightning.storage import write_json, write_text
from fl_lightning.truth import Truth

IMAGES = 6
SHAPE = (3, 24, 24)
PERSONS = ["Ann Mueller", "Ann Mueller", "Bo", "Bo", "", ""]


@pytest.fixture(autouse=True)
def few_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attack_modules.evaluation.strangers.CROPS", 8)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Two scenarios that differ in what is told, two defences, three seeds: 12 cells."""
    base = tmp_path / "base.yaml"
    base.write_text("data: {class_path: Photographs}\nmodel: {class_path: FeatureInversion}\n")
    return Study(
        "A <small> & made-up study",
        [
            Scenario("told", "The labels are told.", {"knowledge.labels": "known"}),
            Scenario("not told", "Nothing is told.", {"knowledge.labels": "inferred"}),
        ],
        [base],
        {"trainer.max_steps": 3},
        [Defence("none"), Defence("noise", "Noise on all updates.", {"federation.client.lr": 0.1})],
        [0, 1, 2],
    )


def leave_run(cell: Cell, out: Path, error: float) -> None:
    """What a run leaves, reconstructions off by noise of a standard deviation `error`; from 1 on they are noise."""
    record, run = Record(out / "federations" / cell.federation), cell.folder(out) / "run"
    originals = pink_noise(IMAGES, SHAPE, seed=cell.seed)
    pixels = (255 * originals).round().byte()
    if not record.truth(0).with_suffix(".json").exists():
        Truth(
            pixels, torch.arange(IMAGES), torch.arange(IMAGES) // 3, LocalTraining(), 1.0,
            [f"class <{i}>" for i in range(IMAGES)], False, [f"private_{i}.png" for i in range(IMAGES)], PERSONS,
        ).save(record.truth(0))  # fmt: skip
    noise = torch.randn(originals.shape, generator=torch.Generator().manual_seed(100 + cell.seed))
    found = (originals + error * noise).clamp(0, 1) if error < 1 else noise.clamp(0, 1)
    save_images(found, run / "images")
    text = io.StringIO()
    writer = csv.writer(text)
    known = ["original", "source", "person", "client", "label", "class"]
    writer.writerow([*known, "reconstruction", "inferred_label", "verdict", "expected_psnr", "psnr", "ssim"])
    for i in range(IMAGES):
        psnr = float(-10 * (found[i] - originals[i]).square().mean().clamp_min(1e-9).log10())
        level = "certain" if error < 0.1 else "not read"
        writer.writerow([i, f"private_{i}.png", PERSONS[i], i // 3, i, f"class <{i}>", i, i, level, "", psnr, 0.5])
    write_text(run / "per_image.csv", text.getvalue())
    told = "known" if "--knowledge.labels=known" in cell.arguments else "inferred"
    write_json(
        run / "results.json",
        {
            "attack": "FeatureInversion",
            "verdict": {"level": level, "images": {}, "missing": 0, "reasons": ["it is noise"] if error >= 1 else []},
            "scores": {"psnr_mean": psnr, "psnr_min": psnr, "ssim_mean": 0.5, "labels_found": 1.0},
            "misfit": error,
            **({"seat": {"class": "CuriousClient"}} if told == "known" else {}),
            "diagnosis": {"num_images": IMAGES, "disentangled": IMAGES, "uncertainty": 0.01},
            "attribution": {"peers": 2, "clients": 2, "adjusted_rand": 1.0},
            "knowledge": {"labels": told, "label_counts": told, "client_lr": "known"},
            "observed_rounds": [0],
            "observation": str(record.directory),
            "peak_memory_mb": 900,
            "versions": {"python": "3.11", "torch": "2.6"},
        },
    )


@pytest.fixture
def fake() -> Callable[[Path], Run]:
    """Runs that succeed, those with the defence `noise` with nothing but noise as images."""

    def made(out: Path) -> Run:
        def run(cell: Cell, folder: Path, threads: int, stop: Event) -> tuple[int, str]:
            leave_run(cell, out, 0.02 if cell.defence.name == "none" else 1.0)
            return 0, ""

        return run

    return made
