import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attack_modules.analytic.defended_head import DefendedLayer
from attack_modules.analytic.noisy_gates import NoisyGates
from attack_modules.analytic.pruned_update import PrunedUpdate
from attack_modules.analytic.results import Diagnosis, Leakage
from attack_modules.attack import Level, Verdict
from attack_modules.feature_inversion.controls import (
    ERRORS,
    control_images,
    gain_of_contrast,
    known_images,
    mean_colour_psnr,
    of_contrast,
)
from attack_modules.feature_inversion.verdict import Evidence, judge
from fl_lightning.models import LeNet5

SURE = Diagnosis(num_images=3, disentangled=3, gap=1e3, residual=0.0, conditioning=1.0, drift=0.01, outside=0.0, held=3)
MODEL = LeNet5(10, (3, 32, 32))


def leakage(diagnosis: Diagnosis = SURE, labels: tuple[int, ...] = (0, 1, 2)) -> Leakage:
    images = len(labels)
    return Leakage(
        torch.tensor(labels), torch.ones(images, 4), torch.zeros(images), diagnosis, torch.full((images,), 0.001)
    )


def verdict(found: Leakage, psnr: float = 30.0, scale: float = 1.0, model: nn.Module = MODEL) -> Verdict:
    evidence = Evidence(found, found.features, torch.full((len(found.labels),), 0.01), drifts=False, scale=scale)
    return judge(evidence, [psnr] * len(found.labels), 35.0, model)


def errors(found: Leakage, corrected: float = 1.0, misfit: float = 0.0, drifts: bool = True) -> list[float]:
    return Evidence(found, found.features * corrected, torch.tensor([0.0, misfit, 0.0]), drifts).errors.tolist()


def test_errors_are_the_largest_of_what_can_be_seen() -> None:
    found = leakage()
    assert errors(found, drifts=False) == pytest.approx([0.001] * 3)
    assert errors(found) == pytest.approx([0.03] * 3)
    assert errors(found, corrected=1.1) == pytest.approx([0.02] * 3)
    assert errors(found, misfit=0.5, drifts=False) == pytest.approx([0.001, 0.5, 0.001])
    compressed = leakage(replace(SURE, compressed=True))
    assert errors(compressed, drifts=False) == pytest.approx([0.0035] * 3)
    for reading, expected in ((PrunedUpdate(), 0.0022), (NoisyGates(), 0.001)):
        read = replace(compressed, noisy=True, defended=DefendedLayer(reading, []))
        assert errors(read, drifts=False) == pytest.approx([expected] * 3)


def test_an_update_that_drift_does_not_explain_makes_all_images_unreliable() -> None:
    found = leakage(replace(SURE, residual=0.07))
    for corrected, level in ((1.2, Level.CERTAIN), (1.01, Level.UNRELIABLE)):
        evidence = Evidence(found, found.features * corrected, torch.zeros(3), drifts=True)
        assert set(judge(evidence, [30.0] * 3, 35.0, MODEL).levels) == {level}


def test_rounding_that_closes_the_gap_is_no_mismatch() -> None:
    assert set(verdict(leakage(replace(SURE, residual=0.04, gap=24.0))).levels) == {Level.CERTAIN}


def test_features_that_nothing_checks_are_unreliable() -> None:
    assert set(verdict(leakage(replace(SURE, checked=False))).levels) == {Level.UNRELIABLE}


def test_images_without_features_of_their_own_disturb_the_others() -> None:
    evidence = Evidence(leakage(), leakage().features, torch.tensor([0.01, 3.0, 0.01]), drifts=False)
    found = judge(evidence, [30.0, 5.0, 30.0], 35.0, MODEL)
    assert found.levels == [Level.UNRELIABLE, Level.NOT_READ, Level.UNRELIABLE]


@pytest.mark.parametrize(
    ("psnr", "level"),
    [(30, Level.CERTAIN), (22, Level.LIKELY), (16, Level.UNRELIABLE), (10, Level.NOT_READ)],
)
def test_level_follows_the_expected_psnr(psnr: float, level: Level) -> None:
    found = verdict(leakage(), psnr)
    assert found.levels == [level] * 3
    assert bool(found.reasons) == (level is not Level.CERTAIN)


@pytest.mark.parametrize(
    ("changed", "level", "words"),
    [
        ({"counted": False}, Level.LIKELY, "cannot be read: the singular values do not fall, and 3 classes are held"),
        ({"counted": False, "held": 1}, Level.LIKELY, "and 1 class is held"),
        ({"shown": 5}, Level.UNRELIABLE, "3 images told, but the update shows 5"),
        ({"views": True}, Level.UNRELIABLE, "augmented"),
        ({"residual": 0.7}, Level.UNRELIABLE, "70% of the head's update are unexplained"),
        ({"residual": 0.05}, Level.UNRELIABLE, "mixup"),
        ({"num_images": 4}, Level.LIKELY, "1 of 4 images were not disentangled"),
        ({"num_images": 6}, Level.UNRELIABLE, "3 of 6 images were not disentangled"),
    ],
)
def test_what_the_expectation_does_not_see_limits_the_level(changed: dict, level: Level, words: str) -> None:
    found = verdict(leakage(replace(SURE, **changed)))
    assert set(found.levels) == {level}
    assert words in found.sentence()
    assert found.advice


@pytest.mark.parametrize(("drift", "level"), [(0.17, Level.UNRELIABLE), (0.05, Level.CERTAIN)])
def test_images_of_shared_classes_must_explain_several_steps_of_both_layers(drift: float, level: Level) -> None:
    found = leakage(replace(SURE, residual=0.26, drift=drift), labels=(0, 0, 1))
    evidence = Evidence(found, found.features, torch.full((3,), 0.01), drifts=True)
    assert set(judge(evidence, [30.0] * 3, 35.0, MODEL).levels) == {level}


def test_scale_batch_statistics_and_shared_classes_limit_the_level() -> None:
    assert set(verdict(leakage(), scale=5.0).levels) == {Level.LIKELY}
    single = nn.Module()
    single.head = nn.Sequential(nn.Linear(4, 10))
    assert verdict(leakage(labels=(0, 4, 4)), model=single).levels == [Level.CERTAIN, *[Level.UNRELIABLE] * 2]
    single.norm = nn.BatchNorm2d(3)
    assert set(verdict(leakage(), model=single).levels) == {Level.UNRELIABLE}


@pytest.mark.parametrize(("flat", "level"), [(30.6, Level.UNRELIABLE), (34.5, Level.NOT_READ)])
def test_known_images_must_come_back_better_than_their_mean_colour(flat: float, level: Level) -> None:
    found = leakage()
    evidence = Evidence(found, found.features, torch.full((3,), 0.01), drifts=False)
    judged = judge(evidence, [30.0] * 3, 35.0, MODEL, flat)
    assert set(judged.levels) == {level}
    assert f"known ones come back at 35 dB, their mean colour is at {flat:.0f} dB" in judged.reasons[0]


@pytest.mark.parametrize(("gain", "level"), [(1.5, Level.UNRELIABLE), (0.5, Level.NOT_READ)])
def test_images_show_something_where_known_ones_of_their_contrast_do(gain: float, level: Level) -> None:
    found = leakage()
    evidence = Evidence(found, found.features, torch.full((3,), 0.01), drifts=False)
    assert set(judge(evidence, [22.0] * 3, 20.0, MODEL, 20.0, gain).levels) == {level}


def test_control_images_of_a_contrast_gain_by_what_of_them_comes_back() -> None:
    """Of a model of which the features are the mean of 2x2 pixels, and one that shows the mean colour alone."""
    images = 0.5 + 0.2 * torch.ones(1, 3, 32, 32).cumsum(3).remainder(2).sub(0.5).sign()
    assert mean_colour_psnr(of_contrast(control_images(3, (3, 32, 32)), 0.04)) == pytest.approx(14, abs=0.1)
    model = SimpleNamespace(mean=torch.zeros(()), embed=lambda images: F.avg_pool2d(images, 2))
    flat = mean_colour_psnr(control_images(6, (3, 32, 32)))
    halved = gain_of_contrast(images, model, lambda features: F.interpolate(features, scale_factor=2), flat)
    grey = gain_of_contrast(images, model, lambda f: f.mean((2, 3), keepdim=True).expand(-1, -1, 32, 32), flat)
    assert halved > 3
    assert abs(grey) < 1e-4
    assert gain_of_contrast(0.1 * images, model, lambda features: features, flat) == -math.inf


def test_an_image_that_fits_far_worse_than_the_others_is_several() -> None:
    evidence = Evidence(leakage(), leakage().features, torch.tensor([0.01, 0.01, 0.08]), drifts=False)
    found = judge(evidence, [30.0] * 3, 35.0, MODEL)
    assert found.levels == [Level.CERTAIN, Level.CERTAIN, Level.UNRELIABLE]


def test_the_whole_is_what_most_images_are_and_missing_ones_count() -> None:
    levels = [Level.CERTAIN, Level.LIKELY]
    assert Verdict(levels).level is Level.LIKELY
    found = Verdict(levels, missing=3, reasons=["a", "b"], advice=["Do this."])
    assert found.level is Level.NOT_READ
    expected = "Verdict: not read. 2 of 5 images found (1 certain, 1 likely), because a; b.\nTo try: Do this."
    assert found.sentence() == expected
    assert "2 of 64 images" in found.sentence(originals=64)
    assert found.results()["images"] == {"certain": 1, "likely": 1, "unreliable": 0, "not read": 0}


def test_expected_psnr_falls_with_the_error() -> None:
    kept, asked, controls = [], [1e-9, *ERRORS, 5.0, 0.02], control_images(len(ERRORS), (3, 32, 32))

    def invert(features: torch.Tensor) -> torch.Tensor:
        kept.append(features)
        right = torch.cat([MODEL.embed(image[None]) for image in controls])
        error = (features - right).norm(dim=1) / right.norm(dim=1)
        return controls + error[:, None, None, None]  # PSNR is -20 log10(error)

    with torch.no_grad():
        returned = known_images(MODEL.embed(torch.rand(4, 3, 32, 32)), MODEL, invert, controls)
    found = returned.psnr_at(asked)
    assert found[1:7] == pytest.approx([50.46, 40, 30.46, 20, 10.46, 0], abs=0.3)
    assert found[0] == found[1]
    assert found[7] == found[6]
    assert 30.46 < found[8] < 40
    assert returned.misfit == sorted(returned.misfit)
    assert returned.misfit_at([ERRORS[2]]) == pytest.approx([returned.misfit[2]])


def test_images_that_come_out_further_from_the_features_than_known_ones_are_not_trusted() -> None:
    misfit = torch.tensor([0.05, 0.05, 0.05])
    evidence = Evidence(leakage(), leakage().features, misfit, drifts=False)
    found = judge(evidence, [30.0] * 3, 35.0, MODEL, usual=torch.tensor([0.02, 0.01, 0.001]))
    assert found.levels == [Level.CERTAIN, Level.UNRELIABLE, Level.UNRELIABLE]
    assert "2 images came out further from the features than known ones do" in found.reasons[0]
    closer = Evidence(leakage(), leakage().features, 0.3 * misfit, drifts=False)
    assert set(judge(closer, [30.0] * 3, 35.0, MODEL, usual=torch.full((3,), 1e-3)).levels) == {Level.CERTAIN}
