"""Defences: what clients or the server add to a round so that less leaks from it. One class a file."""

from fl_lightning.defenses.clipping import Clipping
from fl_lightning.defenses.defense import (
    ClientDefense,
    Defense,
    ServerDefense,
    UpdateDefense,
    defenses_of,
    describe_defenses,
    memory_of,
    occasions,
)
from fl_lightning.defenses.gaussian_noise import GaussianNoise
from fl_lightning.defenses.qsgd import QSGD
from fl_lightning.defenses.quantization import Quantization
from fl_lightning.defenses.random_k import RandomK
from fl_lightning.defenses.sign import Sign
from fl_lightning.defenses.top_k import TopK

__all__ = [
    "QSGD",
    "ClientDefense",
    "Clipping",
    "Defense",
    "GaussianNoise",
    "Quantization",
    "RandomK",
    "ServerDefense",
    "Sign",
    "TopK",
    "UpdateDefense",
    "defenses_of",
    "describe_defenses",
    "memory_of",
    "occasions",
]
