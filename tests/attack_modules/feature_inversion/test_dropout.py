"""Dropout in a single local step, the peers' defence or the model's own: what it leaves of the features is inverted."""

from collections.abc import Callable

import pytest

from attack_modules import FeatureInversion
from attack_modules.analytic.typical_head import pink_noise
from attack_modules.attack import Attack
from attack_modules.evaluation.features import feature_scores
from attack_modules.feature_inversion import inversion
from attack_modules.feature_inversion.verdict import judge
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRound
from fl_lightning.client import LocalTraining
from fl_lightning.defenses import Dropout
from fl_lightning.federation import Federation

Observe = Callable[..., ObservedRound]
Run = Callable[..., Attack]
WIDE = {"num_clients": 3, "images_per_client": 2, "num_classes": 50}


@pytest.mark.parametrize("where", ["hidden", "all"])
def test_a_known_dropout_is_read(observe: Observe, attack: Run, where: str) -> None:
    federation = Federation(client=LocalTraining(local_epochs=1, defenses=[Dropout(where=where)]))
    seen = observe(federation, Knowledge(), **WIDE)
    module = attack(FeatureInversion(), seen, steps=2)
    found = module.reconstruction()
    true = found.embed((pink_noise(64, (3, 16, 16), seed=7)[:4] * 255).round() / 255)
    scores = feature_scores(found.features, true, found.seen)
    assert scores["share_within_1_percent"] == 1
    assert module.diagnosis()["drift"] < 0.02
    assert ("Dropout left" in module.introduction()) == (where == "all") == ("share_seen" in scores)


def test_known_images_are_compared_by_the_features_that_dropout_left(
    observe: Observe, attack: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the found ones are: features that nobody saw are as far off as chance has it."""
    compared = []
    monkeypatch.setattr(inversion, "judge", lambda *given: compared.append(given[-1]) or judge(*given))
    federation = Federation(client=LocalTraining(local_epochs=1, defenses=[Dropout(where="all")]))
    module = attack(FeatureInversion(), observe(federation, Knowledge(), **WIDE), steps=20)
    misfit = module.misfit(*module.reconstruction()[:2])
    module.verdict(misfit)
    assert compared[0].max() < misfit.max()
