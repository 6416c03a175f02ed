"""What the server does with the mean update: plain averaging, momentum, or adaptive steps."""

from fl_lightning.server_optimizers.adaptive import FedAdam, FedYogi, FlowerFedAdam
from fl_lightning.server_optimizers.averaging import FedAvg, FedAvgM
from fl_lightning.server_optimizers.optimizer import ServerOptimizer

__all__ = ["FedAdam", "FedAvg", "FedAvgM", "FedYogi", "FlowerFedAdam", "ServerOptimizer"]
