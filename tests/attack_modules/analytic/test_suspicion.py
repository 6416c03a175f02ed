from dataclasses import replace

import pytest
import torch

from attack_modules.analytic.suspicion import qualified, suspected_defenses
from attack_modules.attack import Level, Verdict
from attack_modules.threat_model.assumptions import Assumptions
from fl_lightning.defenses import (
    QSGD,
    Augmentation,
    ClientDefense,
    Clipping,
    GaussianNoise,
    Mixup,
    PartialSharing,
    Quantization,
    RandomK,
    Sign,
    TopK,
    occasions,
)
from fl_lightning.state_files import Tensors

ASSUMED = Assumptions(client_lr=0.01, local_epochs=1)


def update(seed: int) -> Tensors:
    """Of four images, as a gradient is: of low rank, with inactive units."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"features.0.weight": (32, 75), "features.3.weight": (64, 800), "head.0.weight": (256, 1000),
              "head.2.weight": (20, 256)}  # fmt: skip
    return {
        name: torch.randn(height, 4, generator=generator).relu() @ torch.rand(4, width, generator=generator) ** 4
        for name, (height, width) in shapes.items()
    }


BEFORE = update(9)
"""Weights as large as the updates, whose rounding shows nothing."""


def mean_of(*defenses: ClientDefense) -> Tensors:
    """The mean of four clients' defended updates."""
    sent = []
    for client in range(4):
        own = update(client)
        for defense, occasion in occasions(defenses, own, client, {}):
            own = defense.on_update(own, occasion)
        sent.append(own)
    return {name: torch.stack([own[name] for own in sent]).mean(0) for name in sent[0]}


@pytest.mark.parametrize(
    ("defense", "words"),
    [
        (TopK(keep=0.1), "entries are 0"),
        (TopK(keep=0.01), "entries are 0"),
        (RandomK(keep=0.1), "entries are 0"),
        (Quantization(bits=3), "few levels"),
        (QSGD(levels=2), "few levels"),
        (Sign(), "nearly of one size"),
    ],
    ids=str,
)
def test_compression_is_suspected(defense: ClientDefense, words: str) -> None:
    (clause,) = suspected_defenses(mean_of(defense), BEFORE, ASSUMED)
    assert words in clause
    assert suspected_defenses(mean_of(defense), BEFORE, replace(ASSUMED, defenses=(defense,))) == []
    assert suspected_defenses(mean_of(defense), BEFORE, replace(ASSUMED, defenses=(Clipping(),))) == [clause]
    told = replace(ASSUMED, sources={"defenses": "known", "optimizer": "known"})
    assert suspected_defenses(mean_of(defense), BEFORE, told) == []


@pytest.mark.parametrize(("defense", "word"), [(Augmentation(), "views"), (Mixup(lam=0.4), "mixtures")], ids=str)
def test_what_a_defence_makes_of_images_is_not_taken_for_them(defense: ClientDefense, word: str) -> None:
    certain, told = Verdict([Level.CERTAIN]), replace(ASSUMED, defenses=(defense,))
    assert qualified(certain, [], ASSUMED) == certain
    found = qualified(certain, [], told)
    assert found.level is Level.UNRELIABLE
    assert word in found.sentence()
    unmixed = qualified(certain, [], told, unmixed=True)
    assert (unmixed == certain) == isinstance(defense, Mixup)


@pytest.mark.parametrize("defenses", [(), (GaussianNoise(rho=1.0),), (Quantization(bits=8),)], ids=str)
def test_without_compression_nothing_is_suspected(defenses: tuple) -> None:
    assert suspected_defenses(mean_of(*defenses), BEFORE, ASSUMED) == []


def test_layers_that_stay_are_named() -> None:
    still = {**mean_of(), "head.2.weight": torch.zeros(20, 256)}
    (clause,) = suspected_defenses(still, BEFORE, ASSUMED)
    assert clause.startswith("head.2.weight did not change, as if clients kept them")
    assert suspected_defenses(still, BEFORE, replace(ASSUMED, defenses=(PartialSharing(["head.2"]),))) == []
    assert suspected_defenses(still, BEFORE, replace(ASSUMED, sources={"defenses": "known"})) == [
        "head.2.weight did not change, as if clients did not train them"
    ]


def test_adam_is_suspected_where_it_is_not_told_and_named_where_it_is() -> None:
    signs = mean_of(Sign())
    adam_alone = replace(ASSUMED, sources={"defenses": "known", "optimizer": "guessed"})
    (clause,) = suspected_defenses(signs, BEFORE, adam_alone)
    assert clause.endswith("nearly of one size, as by Adam at the clients")
    adam = replace(ASSUMED, optimizer="Adam")
    assert suspected_defenses(signs, BEFORE, adam) == ["the peers train by Adam, which this attack takes for SGD"]
    assert suspected_defenses(signs, BEFORE, adam, read=True) == []
    assert "as if they trained by SGD" in adam.introduction()
    assert "Adam" not in ASSUMED.introduction()


def test_updates_of_biases_alone_show_what_stayed() -> None:
    biases = {"features.0.bias": torch.zeros(40), "head.0.bias": torch.linspace(-1, 1, 50)}
    assert suspected_defenses(biases, BEFORE, ASSUMED) == [
        "features.0.bias did not change, as if clients kept them for themselves or did not train them"
    ]
