"""Engines that execute the clients' local training."""

from fl_lightning.engines.in_process import Engine, InProcess

__all__ = ["Engine", "InProcess"]
