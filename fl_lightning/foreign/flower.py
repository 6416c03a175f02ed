"""A curious client on Flower: a mod that keeps what passes through a ClientApp, and changes nothing."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fl_lightning.foreign.recorder import Recorder

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Context, Message, RecordDict

Next = Callable[["Message", "Context"], "Message"]
Mod = Callable[["Message", "Context", Next], "Message"]


def curious_mod(directory: Path | str, keep: int = 10) -> Mod:
    """A mod that records the global models and the own update of every round: `ClientApp(mods=[curious_mod(DIR)])`.

    It is the first of `mods`, so that it sees what is sent after all others (clipping, noise). Messages to train carry
    the model with which a round begins, those to evaluate the aggregate at its end; with `fraction_evaluate=1`,
    Flower's default, every client sees every aggregate, also of rounds in which it does not train.

    Args:
        directory: `observe --recorded` reads the folders `run_ID/client_N` in it: Flower's number of the run, and the
            client's `partition-id`, or `node_ID` where it has none.
        keep: rounds that stay on disk, of each run.
    """
    recorders: dict[Path, Recorder] = {}

    def mod(message: "Message", context: "Context", call_next: Next) -> "Message":
        client = context.node_config.get("partition-id")
        seat = f"node_{context.node_id}" if client is None else f"client_{client}"
        folder = Path(directory) / f"run_{context.run_id}" / seat
        recorder = recorders.setdefault(folder, Recorder(folder, keep))  # a simulation's process is many clients
        return record_message(recorder, message, context, call_next)

    return mod


def record_message(recorder: Recorder, message: "Message", context: "Context", call_next: Next) -> "Message":
    """Answer a message as the client does, and keep its model and that of the reply."""
    kind = message.metadata.message_type.partition(".")[0]
    sent = message.content if kind in ("train", "evaluate") else None
    if sent is not None:
        with recorder.harmless(f"a message to {kind}"):
            # Flower counts rounds from 1: round 1 trains w_0, and evaluates w_1
            recorder.global_model(_state(sent), _server_round(sent) - (kind == "train"))
    reply = call_next(message, context)
    if sent is not None and kind == "train" and not reply.has_error():
        with recorder.harmless("a reply"):
            counts = [record["num-examples"] for record in reply.content.metric_records.values()]
            recorder.own_model(_state(reply.content), _server_round(sent) - 1, num_examples=int(counts[0]))
    return reply


def _server_round(content: "RecordDict") -> int:
    rounds = [config["server-round"] for config in content.config_records.values() if "server-round" in config]
    if not rounds:
        raise ValueError("the message has no 'server-round' in its config")
    return int(rounds[0])


def _state(content: "RecordDict") -> Mapping[str, np.ndarray] | list[np.ndarray]:
    """The one model of a message, by name, or nameless where Flower numbered the arrays."""
    records: list[ArrayRecord] = list(content.array_records.values())
    if len(records) != 1:
        raise ValueError(f"the message holds {len(records)} records of arrays, so it is unknown which is the model")
    arrays = {name: array.numpy() for name, array in records[0].items()}
    numbered = [str(i) for i in range(len(arrays))]
    return [arrays[name] for name in numbered] if set(arrays) == set(numbered) else arrays
