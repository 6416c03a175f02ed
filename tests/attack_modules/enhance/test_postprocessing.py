"""Enhancements are chosen, and refused, before an attack starts."""

from collections.abc import Callable
from pathlib import Path

import pytest

from attack_modules.enhance.direct.enhancer import DirectEnhancement
from attack_modules.enhance.enhancer import Enhancer
from attack_modules.enhance.postprocessing import Postprocessing
from attack_modules.enhance.rog.enhancer import GAN
from attack_modules.enhance.shortcuts import NAMED, small_semantic
from attack_modules.threat_model.observed import RoundsSummary
from cli import main
from fl_lightning.errors import AuditError, MissingFile, SettingError

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("name", "make", "error", "sentence"),
    [
        ("gan", lambda: GAN(Path("gone")), MissingFile, "There are no weights at 'gone.postmodel.pth'. Get them from"),
        ("semantic", small_semantic, SettingError, "attacked model has 16 classes, but the diffusion model has 10"),
    ],
    ids=["gan", "semantic"],
)
def test_an_enhancement_that_cannot_be_is_refused_before_the_federation_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    make: Callable[[], Enhancer],
    error: type[AuditError],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(NAMED, name, make)
    with pytest.raises(error, match=sentence):
        main(["fit", "--config", str(ROOT / "configs/inversion.yaml"), "--postprocess", name])
    assert not list(tmp_path.iterdir())


def test_a_comparison_leaves_out_what_does_not_fit() -> None:
    description = {
        "class_path": "fl_lightning.models.LeNet5",
        "init_args": {"num_classes": 10, "image_shape": [3, 32, 48]},
    }
    rounds = RoundsSummary.of_model(description, [])
    comparison = Postprocessing({"direct": DirectEnhancement(), "semantic": small_semantic()})
    comparison.check(rounds)
    assert list(comparison.enhancers) == ["direct"]
    assert comparison.left_out["semantic"].startswith("Semantic enhancement takes square RGB or grey images")
    assert comparison.compares
