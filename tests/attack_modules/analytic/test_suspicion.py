import pytest
import torch

from attack_modules.analytic.suspicion import suspected_defenses
from fl_lightning.defenses import QSGD, ClientDefense, GaussianNoise, Quantization, RandomK, Sign, TopK, occasions
from fl_lightning.state_files import Tensors


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
    (clause,) = suspected_defenses(mean_of(defense), BEFORE)
    assert words in clause


@pytest.mark.parametrize("defenses", [(), (GaussianNoise(rho=1.0),), (Quantization(bits=8),)], ids=str)
def test_without_compression_nothing_is_suspected(defenses: tuple) -> None:
    assert suspected_defenses(mean_of(*defenses), BEFORE) == []


def test_layers_that_stay_are_named() -> None:
    (clause,) = suspected_defenses({**mean_of(), "head.2.weight": torch.zeros(20, 256)}, BEFORE)
    assert clause.startswith("head.2.weight did not change")


def test_updates_of_biases_alone_show_what_stayed() -> None:
    biases = {"features.0.bias": torch.zeros(40), "head.0.bias": torch.linspace(-1, 1, 50)}
    assert suspected_defenses(biases, {}) == [
        "features.0.bias did not change, as if clients kept them for themselves or did not train them"
    ]
