"""Defences that the attacker knows: which reading is taken, and what that makes of the images."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from attack_modules import FeatureInversion
from attack_modules.analytic import leak_defended
from attack_modules.analytic.adam_step import AdamStep
from attack_modules.analytic.defended_head import DefendedFeatures, DefendedReading, Expected, HeadRound
from attack_modules.analytic.leak import leak_rounds
from attack_modules.analytic.leak_defended import leak_known
from attack_modules.analytic.noisy_gates import NoisyGates
from attack_modules.analytic.pruned_update import PrunedUpdate
from attack_modules.analytic.results import TrainingKnowledge
from attack_modules.attack import Attack, AttackError, Level
from attack_modules.evaluation.assignment import match
from attack_modules.feature_inversion.rounds import ChangingParticipants
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRounds
from fl_lightning.client import LocalTraining
from fl_lightning.data import ImageFolder
from fl_lightning.defenses import GaussianNoise, Mixup, Sign, TopK
from fl_lightning.defenses.defense import ClientDefense
from fl_lightning.federation import Federation
from fl_lightning.observation import Observation

Observe = Callable[..., Observation]
Run = Callable[..., Attack]
IMAGENET = Path(__file__).parents[4] / "shared" / "data" / "imagenet-sample"
WIDE = {"num_clients": 3, "images_per_client": 2, "num_classes": 50}


def trained(*defenses: ClientDefense) -> Federation:
    return Federation(client=LocalTraining(local_epochs=1, defenses=list(defenses)))


@pytest.mark.parametrize(("defense", "reading"), [(GaussianNoise(rho=0.3), NoisyGates), (TopK(0.3), PrunedUpdate)])
def test_known_defence_chooses_the_reading(
    observe: Observe, attack: Run, defense: ClientDefense, reading: type
) -> None:
    known = attack(FeatureInversion(), observe(trained(defense), Knowledge(), **WIDE), steps=6)
    assert isinstance(known.leakage.defended.reading, reading)
    assert known.leakage.labels.tolist() == [0, 1, 2, 3]
    assert ((known.noise > 0.01) & (known.noise < 1)).all()
    assert torch.equal(known.features, known.leakage.features) != (reading is PrunedUpdate)
    assert (known.weights is not None) == (reading is PrunedUpdate)
    if reading is PrunedUpdate:  # what nobody sent does not count
        assert not torch.equal(known.weights, known.leakage.weights)
        changed, weights = known.features + (known.weights == 0), known.weights
        torch.testing.assert_close(*(known.feature_error(known.best, f, weights) for f in (changed, known.features)))
        assert (known.weights == 0).any()
    assert known.diagnosis()["uncertainty"] == known.noise.median()  # of what was inverted last
    plain = attack(FeatureInversion(), observe(trained(defense), Knowledge(defenses="unknown"), **WIDE), steps=2)
    assert plain.leakage.defended is None
    assert plain.noise is None


def test_rounds_with_different_participants_are_read_again(noise_images: type, attack: Run, tmp_path: Path) -> None:
    data = noise_images(num_clients=5, images_per_client=2, image_size=16, num_classes=50)
    training = LocalTraining(local_epochs=1, defenses=[TopK(0.3)])
    federation = Federation(
        client=training, rounds=2, clients_per_round=3, broadcast="all", observed_rounds=[0, 1], seed=1
    )
    observed = ObservedRounds(Knowledge(), federation, data, tmp_path)
    observed.prepare_data()
    observed.setup()
    module = attack(FeatureInversion(rounds=ChangingParticipants()), *observed.rounds, steps=6)
    assert "read by PrunedUpdate, and once more" in module.introduction()
    assert not torch.equal(module.features, module.leakage.features)


class Unsolvable(NoisyGates):
    def solve(self, rounds: Sequence[HeadRound], expected: Expected) -> DefendedFeatures:
        raise torch.linalg.LinAlgError("singular")


class Unexplaining(PrunedUpdate):
    """After training, images as far off as 8 dB were likely, where more than this was unexplained."""

    def solve(self, rounds: Sequence[HeadRound], expected: Expected) -> DefendedFeatures:
        return replace(super().solve(rounds, expected), residual=self.most_unexplained + 0.01)


@pytest.mark.parametrize(
    ("classes", "reading", "words"),
    [
        (5, Unsolvable(), "gives Unsolvable equations"),
        (5, Unexplaining(), "leaves 41% of the head's update unexplained"),
        (4, NoisyGates(), "4 images are of 4 of 4 classes.* has none"),
    ],
)
def test_what_a_reading_cannot_solve_is_read_without_it(classes: int, reading: DefendedReading, words: str) -> None:
    random = torch.Generator().manual_seed(0)
    first, last = 0.1 * torch.randn(128, 50, generator=random), 0.1 * torch.randn(classes, 128, generator=random)
    features, weights = torch.rand(4, 50, generator=random), [{"first": first, "last": last}]
    hidden = (features @ first.T).relu()
    errors = (hidden @ last.T).softmax(1) - torch.eye(classes)[:4]
    slopes = (errors @ last) * (hidden > 0)
    update = [{"first": 0.1 / 4 * slopes.T @ features, "last": 0.1 / 4 * errors.T @ hidden}]
    training = TrainingKnowledge(0.1, 1, 4, torch.arange(4), reading=reading)
    with pytest.warns(UserWarning, match=rf"{words}.*goes on as if the peers trained by SGD without a defence"):
        found = leak_known(update, weights, training)
    assert found.defended is None
    assert (found.features - features).norm() < 1e-2 * features.norm()


def test_what_neither_reads_ends_with_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def hundreds(*_: object) -> None:
        raise AttackError("359 images were counted.")

    monkeypatch.setattr(leak_defended, "leak_rounds", hundreds)
    update = {"first": torch.zeros(8, 5), "last": torch.zeros(3, 8)}
    training = TrainingKnowledge(0.1, 3, reading=AdamStep())
    words = "1 round of 3 steps came. As if .* by SGD .* cannot be read either"
    with pytest.warns(UserWarning, match="goes on"), pytest.raises(AttackError, match=words) as error:
        leak_known([update], [update], training)
    assert len(str(error.value)) <= 400


def test_images_that_were_mixed_are_unmixed(observe: Observe, attack: Run) -> None:
    seen = observe(trained(Mixup(lam=0.3)), Knowledge(), **WIDE)
    found = attack(FeatureInversion(), seen, steps=4)
    mixing = found.leakage.mixing
    assert set(mixing.diagonal().mul(1000).round().tolist()) <= {700, 1000}
    assert (mixing.diagonal() < 1).any()
    originals = torch.rand(found.best.shape, generator=torch.Generator().manual_seed(0))
    mixed = torch.tensordot(mixing, originals, 1)
    found.best.copy_(mixed)
    result = found.reconstruction()
    torch.testing.assert_close(result.images, originals, rtol=0, atol=1e-5)
    assert result.consistency_error is None
    misfit, of_mixed = found.misfit(originals, result.labels), found.feature_error(mixed, found.features).sqrt()
    torch.testing.assert_close(misfit[0], of_mixed[mixing[:, 0] > 0].max(), rtol=1e-3, atol=0)
    expected = torch.tensor(found.verdict(misfit).expected_psnr)
    lost = 10 * torch.linalg.inv(mixing).square().sum(1).log10()  # images of a pair have the same misfit
    found.unmixing = torch.eye(len(mixing))
    torch.testing.assert_close(torch.tensor(found.verdict(misfit).expected_psnr) - expected, lost, rtol=0, atol=0.01)
    several = FeatureInversion(rounds=ChangingParticipants())
    with pytest.raises(AttackError, match="mix their images anew"):
        attack(several, seen, steps=1)


def test_defences_that_cannot_be_read_are_left_out_with_a_warning() -> None:
    random = torch.Generator().manual_seed(0)
    weights = [{"weight": 0.1 * torch.randn(30, 50, generator=random)}]
    features = torch.rand(3, 50, generator=random)
    errors = (features @ weights[0]["weight"].T).softmax(1) - torch.nn.functional.one_hot(torch.arange(3), 30)
    update = [{"weight": 0.1 / 3 * errors.T @ features}]
    training = TrainingKnowledge(0.1, 1, 3, torch.arange(3), reading=NoisyGates())
    with pytest.warns(UserWarning, match="heads of two linear layers"):
        found = leak_known(update, weights, training)
    assert torch.equal(found.features, leak_rounds(update, weights, training).features)


def of_photographs(
    folder: Path, attack: Run, defense: ClientDefense, told: Literal["known", "unknown"]
) -> tuple[Attack, Tensor, Tensor]:
    """8 photographs of 4 peers at 32 pixels: the attack, which image matches each original, and its PSNR in dB."""
    data = ImageFolder(root=IMAGENET, num_clients=5, images_per_client=2, image_size=32)
    blind = {"labels": "inferred", "label_counts": "inferred", "num_images": "inferred", "num_clients": "inferred"}
    rounds = ObservedRounds(Knowledge(**blind, defenses=told), trained(defense), data, folder)
    rounds.prepare_data()
    rounds.setup()
    found = attack(FeatureInversion(), *rounds.rounds, steps=100)
    images, originals = found.reconstruction().images, torch.cat([peer.images for peer in data.clients[:4]])
    order = match(images, originals)
    return found, order, -10 * (images[order] - originals).square().mean((1, 2, 3)).log10()


@pytest.mark.slow
@pytest.mark.skipif(not IMAGENET.is_dir(), reason="needs ../shared/data/imagenet-sample")
@pytest.mark.parametrize(("defense", "gain"), [(GaussianNoise(rho=1.0), 1.5), (TopK(0.1), 1.0), (Mixup(lam=0.4), 4.0)])
def test_who_knows_the_defence_sees_more(tmp_path: Path, attack: Run, defense: ClientDefense, gain: float) -> None:
    """Nothing is certain that is not so."""
    psnr = {}
    for told in ("unknown", "known"):
        found, order, each = of_photographs(tmp_path, attack, defense, told)
        result = found.reconstruction()
        levels = found.verdict(found.misfit(result.images, result.labels)).levels
        assert all(each[i] > 20 for i, image in enumerate(order) if levels[image] is Level.CERTAIN)
        psnr[told] = each.mean().item()
    assert psnr["known"] > psnr["unknown"] + gain


@pytest.mark.slow
@pytest.mark.skipif(not IMAGENET.is_dir(), reason="needs ../shared/data/imagenet-sample")
def test_peers_and_images_of_signs(tmp_path: Path, attack: Run) -> None:
    """The same photographs, of which an attack that knows of no defence counts hundreds."""
    found, order, psnr = of_photographs(tmp_path, attack, Sign(), "known")
    peers, seen = torch.arange(4).repeat_interleave(2), found.leakage.peers[order]
    assert torch.equal(seen[:, None] == seen, peers[:, None] == peers)
    assert psnr.mean() > 15
