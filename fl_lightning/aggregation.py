"""Server-side aggregation of the clients' updates: their mean (McMahan et al. 2017), and the server's step."""

from collections.abc import Iterable

import torch

from fl_lightning.client import ClientUpdate, Tensors
from fl_lightning.errors import SettingError
from fl_lightning.server_optimizers import ServerOptimizer


def aggregate(clients: Iterable[ClientUpdate]) -> ClientUpdate:
    """Average the clients' updates and buffers, each weighted by the client's number of examples.

    A client without examples has no weight. The mean is computed incrementally, so that one client's update at
    a time needs to be in memory. Integer buffers (BatchNorm's batch counters) are taken from the first client.

    Args:
        clients: results of the round's clients, in any order.

    Returns:
        The weighted mean, with the total number of examples.

    Raises:
        SettingError: the clients have no examples in total.
    """
    update: Tensors = {}
    buffers: Tensors = {}
    total = 0
    for client in clients:
        if not client.num_examples:
            continue
        total += client.num_examples
        _average(update, client.update, client.num_examples / total)
        _average(buffers, client.buffers, client.num_examples / total)
        del client  # before the next one trains
    if not total:
        raise SettingError("No client with images took part in this round, so there is nothing to aggregate.")
    return ClientUpdate(update, buffers, total)


def _average(mean: Tensors, terms: Tensors, share: float) -> None:
    """One more term of a running weighted mean, in place."""
    for name, term in terms.items():
        if name not in mean:
            mean[name] = term.clone()
        elif term.is_floating_point():
            mean[name].lerp_(term, share)


def server_step(
    parameters: Tensors,
    mean_update: Tensors,
    server_lr: float,
    optimizer: ServerOptimizer,
    memory: dict[str, Tensors],
    round_: int,
) -> Tensors:
    """Compute the next global model, `w_{t+1} = w_t - server_lr * step(u)`, from the mean update `u`.

    Parameters without an update, which were frozen, stay as they are.

    Args:
        parameters: of `w_t`, by name.
        mean_update: before minus after, by name; it is emptied.
        server_lr: of the server.
        optimizer: of the server.
        memory: what it keeps of each parameter, by name; changed in place.
        round_: number of the round, from 0.
    """
    after = dict(parameters)
    for name in list(mean_update):  # of which no more is held than needed: a head has 100 MB and more
        step = optimizer.step(mean_update.pop(name), memory.setdefault(name, {}), round_)
        after[name] = torch.sub(parameters[name], step, alpha=server_lr)
    return after
