"""What differential privacy guarantees, accounted for by Opacus."""

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from fl_lightning.errors import SettingError


@dataclass(frozen=True)
class Privacy:
    """A guarantee of (epsilon, delta)-differential privacy.

    It is for anybody who sees all rounds' models, whatever they know beside. Nothing is gained in it from sampling of
    clients or images, which is not Poisson sampling here, and which the observing client may know.

    Attributes:
        unit: what is protected: a single `image`, or a `client` with all its images; removed, or replaced by nothing.
        epsilon: of all rounds together.
        delta: of all rounds together.
        trusts_server: whether the server sees more, and is trusted.
    """

    unit: Literal["image", "client"]
    epsilon: float
    delta: float
    trusts_server: bool


def epsilon_of(noise_multiplier: float, steps: int, delta: float) -> float:
    """Epsilon at `delta` of so many Gaussian mechanisms, by Opacus' account of Renyi differential privacy.

    Args:
        noise_multiplier: standard deviation of the noise over the sensitivity.
        steps: number of mechanisms.
        delta: of all together.
    """
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, 1.0, steps)]
    orders = [1 + x / 100 for x in range(1, 1000)] + list(range(11, 64)) + [2**k for k in range(6, 14)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of orders at the end of the list, where epsilon is huge and means nothing
        return accountant.get_epsilon(delta, alphas=orders)


def refuse_unaccountable(name: str, delta: float) -> None:
    """Refuse a defence whose privacy cannot be accounted for.

    Raises:
        SettingError: Opacus is not installed, or delta is no probability between 0 and 1.
    """
    if find_spec("opacus") is None:
        raise SettingError(f"{name} needs Opacus, which is not installed: `pip install 'curious-client[dp]'`.")
    if not 0 < delta < 1:
        raise SettingError(f"{name} needs delta between 0 and 1, below one over the number of units, but got {delta}.")
