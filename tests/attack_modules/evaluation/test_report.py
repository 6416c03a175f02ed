import csv
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attack_modules.attack import Level, Reconstruction, Verdict
from attack_modules.evaluation.metrics import score
from attack_modules.evaluation.persons import by_person
from attack_modules.evaluation.report import Outcome, panel, table
from fl_lightning.client import LocalTraining
from fl_lightning.truth import Truth


@pytest.fixture
def truth() -> Truth:
    pixels = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Truth(
        pixels=pixels,
        labels=torch.tensor([1, 0, 1]),
        clients=torch.tensor([0, 0, 2]),
        training=LocalTraining(),
        server_lr=1.0,
        class_names=["cat", "a class with a very long name"],
        imagenet_labels=False,
        sources=["a.png", "b,b.png", "c.png"],
    )


def two_of_three(truth: Truth) -> tuple[Reconstruction, Outcome]:
    """The last image first, the first second; the middle one is missing."""
    images, labels = truth.images[[2, 0]], torch.tensor([1, 0])
    outcome = Outcome(images, labels, score(images, truth.images, labels, truth.labels), torch.tensor([0.1, 0.2]))
    return Reconstruction(images, labels, peers=torch.tensor([5, 4])), outcome


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def test_each_original_has_a_row_with_its_source(truth: Truth) -> None:
    reconstruction, outcome = two_of_three(truth)
    first, missing, last = rows(table(truth, {"reconstruction": outcome}, reconstruction))
    assert (first["source"], first["client"], first["class"]) == ("a.png", "0", "a class with a very long name")
    assert (first["reconstruction"], first["inferred_label"], first["peer"], first["misfit"]) == ("1", "0", "4", "0.2")
    assert (first["label_correct"], last["label_correct"]) == ("0", "1")
    assert (missing["source"], missing["reconstruction"], missing["peer"]) == ("b,b.png", "", "")
    assert math.isnan(float(missing["misfit"]))


def test_what_leaked_of_each_person(truth: Truth) -> None:
    reconstruction, outcome = two_of_three(truth)
    shown = replace(truth, persons=["Ann", "Bo", "Ann"])
    assert [row["person"] for row in rows(table(shown, {"reconstruction": outcome}, reconstruction))] == shown.persons
    assert by_person(shown, outcome.scorecard) == {
        "Ann": {"images": 2, "found": 2, "seen": 2, "best_psnr": math.inf, "clients": [0, 2]},
        "Bo": {"images": 1, "found": 0, "seen": 0, "best_psnr": None, "clients": [0]},
    }
    assert by_person(replace(truth, persons=["", "", ""]), outcome.scorecard) == {}
    assert by_person(truth, outcome.scorecard) == {}


def test_without_truth_each_reconstruction_has_a_row(truth: Truth) -> None:
    reconstruction, outcome = two_of_three(truth)
    verdict = Verdict([Level.LIKELY, Level.NOT_READ], expected_psnr=[23.46, 9.0])
    outcome = replace(outcome, scorecard=None, verdict=verdict)
    first, second = rows(table(None, {"reconstruction": outcome}, reconstruction))
    told = {"reconstruction": "0", "inferred_label": "1", "peer": "5", "verdict": "likely", "expected_psnr": "23.5"}
    assert first == told | {"misfit": "0.1"}
    assert second["peer"] == "4"


def test_enhanced_columns_stand_beside_the_raw_ones(truth: Truth) -> None:
    reconstruction, raw = two_of_three(truth)
    flipped = raw.images.flip(3)
    card = score(flipped, truth.images, None, truth.labels, assignment=raw.scorecard.assignment)
    outcomes = {"reconstruction": raw, "direct": Outcome(flipped, raw.labels, card, torch.tensor(0.5))}
    row = rows(table(truth, outcomes, reconstruction))[0]
    assert float(row["psnr"]) > float(row["direct_psnr"])
    assert row["direct_misfit"] == "0.5"  # one number for all images
    assert "direct_label_correct" not in row


def captions_of(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> list[str]:
    drawn: list[list[str]] = []

    def draw(images: dict[str, Tensor], captions: list[str]) -> None:
        drawn.append(captions)

    monkeypatch.setattr("attack_modules.evaluation.report.draw_panel", draw)
    panel(*arguments)
    return drawn[0]


def test_captions_name_class_client_and_what_was_not_found(truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    _, outcome = two_of_three(truth)
    first, missing, last = captions_of(monkeypatch, truth, {"reconstruction": outcome})
    assert first.splitlines() == ["a class with a …", "client 0", "inf dB"]
    assert missing.splitlines() == ["cat", "client 0", "not found"]
    assert last.splitlines()[1] == "client 2"


def test_captions_without_truth_say_what_the_attack_found(truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    reconstruction, outcome = two_of_three(truth)
    outcome = replace(outcome, scorecard=None)
    captions = captions_of(monkeypatch, None, {"reconstruction": outcome}, reconstruction.peers)
    assert captions == ["class 1\npeer 5\nmisfit 0.1", "class 0\npeer 4\nmisfit 0.2"]


def test_panels_are_drawn(truth: Truth) -> None:
    reconstruction, outcome = two_of_three(truth)
    assert panel(truth, {"reconstruction": outcome}).width > 3 * 96
    assert panel(None, {"reconstruction": replace(outcome, scorecard=None)}, reconstruction.peers).width > 2 * 96
