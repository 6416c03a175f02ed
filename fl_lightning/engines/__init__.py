"""Engines that execute the clients' local training."""

from fl_lightning.engines.engine import Engine
from fl_lightning.engines.flower import Flower
from fl_lightning.engines.in_process import InProcess

__all__ = ["Engine", "Flower", "InProcess"]
