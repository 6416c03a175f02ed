"""The federation's part in Flower: it sends clients what the federation's process asks for, and decides nothing."""

import time
from collections.abc import Mapping
from multiprocessing.connection import Client

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Pass requests on until the federation's process closes the connection."""
    nodes = _nodes(grid, int(context.run_config["num-clients"]))
    with Client(str(context.run_config["address"]), "AF_UNIX") as federation:
        while True:
            try:
                kind, server_round, models = federation.recv()
            except (EOFError, ConnectionResetError):
                return
            federation.send(_exchange(grid, nodes, kind, server_round, models))


def _exchange(
    grid: Grid, nodes: Mapping[int, int], kind: str, server_round: int, models: dict[int, dict[str, np.ndarray]]
) -> dict[int, dict[str, np.ndarray] | str]:
    """Send each client its model, and wait for all replies: the client's model, or what went wrong there."""
    config = ConfigRecord({"server-round": server_round})
    messages = []
    for client, model in models.items():
        arrays = ArrayRecord({name: Array(array) for name, array in model.items()})
        content = RecordDict({"arrays": arrays, "config": config})
        messages.append(Message(content, dst_node_id=nodes[client], message_type=kind))
    clients = {node: client for client, node in nodes.items()}
    return {clients[reply.metadata.src_node_id]: _content(reply) for reply in grid.send_and_receive(messages)}


def _content(reply: Message) -> dict[str, np.ndarray] | str:
    if reply.has_error():
        return reply.error.reason or f"error {reply.error.code} of Flower"
    return {name: array.numpy() for arrays in reply.content.array_records.values() for name, array in arrays.items()}


def _nodes(grid: Grid, num_clients: int) -> dict[int, int]:
    """Flower's number of the node of each client, once all are there."""
    while len(nodes := list(grid.get_node_ids())) < num_clients:
        time.sleep(0.2)
    questions = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes]
    replies = list(grid.send_and_receive(questions))
    return {int(reply.content["who"]["client"]): reply.metadata.src_node_id for reply in replies}
