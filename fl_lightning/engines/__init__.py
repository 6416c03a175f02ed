"""Where clients run."""

from fl_lightning.engines.in_process import Engine, InProcess

__all__ = ["Engine", "InProcess"]
