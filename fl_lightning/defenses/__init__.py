"""Defences: what clients or the server add to a round so that less leaks from it. One class a file."""

from fl_lightning.defenses.adaptive_clipping import AdaptiveClipping
from fl_lightning.defenses.augmentation import Augmentation
from fl_lightning.defenses.clipping import Clipping
from fl_lightning.defenses.defense import (
    ClientDefense,
    Defense,
    ServerDefense,
    UpdateDefense,
    defenses_of,
    describe_defenses,
    guaranteeing,
    memory_of,
    occasions,
    refuse_unfit_order,
)
from fl_lightning.defenses.dp_fed_avg import DPFedAvg
from fl_lightning.defenses.dp_sgd import DPSGD
from fl_lightning.defenses.dropout import Dropout
from fl_lightning.defenses.fed_prox import FedProx
from fl_lightning.defenses.gaussian_noise import GaussianNoise
from fl_lightning.defenses.half_precision import HalfPrecision
from fl_lightning.defenses.local_dp import LocalDP
from fl_lightning.defenses.mixup import Mixup
from fl_lightning.defenses.partial_sharing import PartialSharing
from fl_lightning.defenses.privacy import Privacy
from fl_lightning.defenses.qsgd import QSGD
from fl_lightning.defenses.quantization import Quantization
from fl_lightning.defenses.random_k import RandomK
from fl_lightning.defenses.sign import Sign
from fl_lightning.defenses.soteria import Soteria
from fl_lightning.defenses.top_k import TopK

__all__ = [
    "DPSGD",
    "QSGD",
    "AdaptiveClipping",
    "Augmentation",
    "ClientDefense",
    "Clipping",
    "DPFedAvg",
    "Defense",
    "Dropout",
    "FedProx",
    "GaussianNoise",
    "HalfPrecision",
    "LocalDP",
    "Mixup",
    "PartialSharing",
    "Privacy",
    "Quantization",
    "RandomK",
    "ServerDefense",
    "Sign",
    "Soteria",
    "TopK",
    "UpdateDefense",
    "defenses_of",
    "describe_defenses",
    "guaranteeing",
    "memory_of",
    "occasions",
    "refuse_unfit_order",
]
