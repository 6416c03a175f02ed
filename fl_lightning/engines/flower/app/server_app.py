"""The server: Flower's FedAvg."""

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from net import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Rounds of all four clients."""
    torch.manual_seed(0)
    strategy = FedAvg(min_train_nodes=4, min_evaluate_nodes=4, min_available_nodes=4)
    strategy.start(grid, ArrayRecord(Net().state_dict()), num_rounds=int(context.run_config["num-rounds"]))
