"""Clients on Flower (https://flower.ai): each in a SuperNode of its own, on this machine."""

from fl_lightning.engines.flower.engine import Flower

__all__ = ["Flower"]
