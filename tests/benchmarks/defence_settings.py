"""The defences that the tables of utility and of leakage share."""

from dataclasses import dataclass, field
from typing import Literal

from fl_lightning.defenses import (
    DPSGD,
    QSGD,
    AdaptiveClipping,
    Augmentation,
    ClientDefense,
    Clipping,
    DPFedAvg,
    Dropout,
    FedProx,
    GaussianNoise,
    HalfPrecision,
    Mixup,
    PartialSharing,
    Quantization,
    RandomK,
    ServerDefense,
    Sign,
    Soteria,
    TopK,
)


@dataclass(frozen=True)
class Setting:
    """What the federation of a row has beside the settings that all rows share."""

    client: list[ClientDefense] = field(default_factory=list)
    server: list[ServerDefense] = field(default_factory=list)
    optimizer: Literal["SGD", "Adam"] = "SGD"
    label_smoothing: float = 0.0


def settings(norm: float) -> dict[str, Setting]:
    """The defences by name, where the norm of a client's update is about `norm`."""
    return {
        "none": Setting(),
        "noise rho 10": Setting([GaussianNoise(rho=10.0)]),
        "top-k 1 %": Setting([TopK(keep=0.01)]),
        "sign": Setting([Sign()]),
        "clipping 0.1": Setting([Clipping(norm=0.1 * norm)]),
        "DP-FedAvg z 1": Setting(server=[DPFedAvg(norm=norm, noise_multiplier=1.0)]),
        "DP-SGD z 1": Setting([DPSGD(max_grad_norm=1.0, noise_multiplier=1.0)]),
        "mixup 0.4": Setting([Mixup(lam=0.4)]),
        "dropout 0.5": Setting([Dropout()]),
        "noise rho 3": Setting([GaussianNoise(rho=3.0)]),
        "int4": Setting([Quantization(bits=4)]),
        "QSGD 4": Setting([QSGD(levels=4)]),
        "top-k 10 %": Setting([TopK(keep=0.1)]),
        "Adam": Setting(optimizer="Adam"),
        "crop and flip": Setting([Augmentation(crop=4)]),
        "noise rho 1": Setting([GaussianNoise(rho=1.0)]),
        "DP-FedAvg z 0.001": Setting(server=[DPFedAvg(norm=norm, noise_multiplier=0.001)]),
        "Soteria 1 %": Setting([Soteria(percent=1.0)]),
        "private last layer": Setting([PartialSharing(private=["head.2.*"])]),
        "QSGD 1": Setting([QSGD(levels=1)]),
        "QSGD 16": Setting([QSGD(levels=16)]),
        "int8": Setting([Quantization(bits=8)]),
        "bf16": Setting([HalfPrecision()]),
        "random-k 10 %": Setting([RandomK(keep=0.1)]),
        "FedProx mu 1": Setting([FedProx(mu=1.0)]),
        "adaptive clipping": Setting(server=[AdaptiveClipping(initial=0.1 * norm)]),
        "dropout 0.5 of features": Setting([Dropout(where="features")]),
        "noise rho 30": Setting([GaussianNoise(rho=30.0)]),
        "noise rho 0.3": Setting([GaussianNoise(rho=0.3)]),
        "label smoothing 0.1": Setting(label_smoothing=0.1),
    }
