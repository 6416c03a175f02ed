"""What the server does with the clients' updates: FedAvg (McMahan et al. 2017)."""

from collections.abc import Iterable

from fl_lightning.client import ClientUpdate, Tensors
from fl_lightning.errors import SettingError


def aggregate(clients: Iterable[ClientUpdate]) -> ClientUpdate:
    """The mean of the clients' updates and buffers, each weighted by its number of examples.

    Takes an iterable, so that no more than two clients' updates need to be in memory.

    Raises:
        SettingError: there is no example at all.
    """
    update: Tensors = {}
    buffers: Tensors = {}
    total = 0
    for client in clients:
        total += client.num_examples
        for mean, terms in ((update, client.update), (buffers, client.buffers)):
            for name, term in terms.items():
                if name not in mean:
                    mean[name] = term.clone()
                elif term.is_floating_point():
                    mean[name].lerp_(term, client.num_examples / total)  # running weighted mean
    if not total:
        raise SettingError("No client with images took part in this round, so there is nothing to aggregate.")
    return ClientUpdate(update, buffers, total)


def server_step(parameters: Tensors, mean_update: Tensors, server_lr: float) -> Tensors:
    """The next global model: `w_{t+1} = w_t - server_lr * u`, `u` the mean update (before minus after)."""
    return {name: before - server_lr * mean_update[name] for name, before in parameters.items()}
