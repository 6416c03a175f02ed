"""A client of the federation on Flower: it trains by `local_update`; the observer records what passes by."""

from pathlib import Path

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable


def observe(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """The mod of the curious client; at the others it does nothing."""
    folder = context.node_config["records"]
    if not folder or message.metadata.message_type == "query":
        return call_next(message, context)
    from fl_lightning.foreign import Recorder  # a process for each message: most need no PyTorch
    from fl_lightning.foreign.flower import record_message

    return record_message(Recorder(str(folder)), message, context, call_next)


app = ClientApp(mods=[observe])


@app.query()
def tell_who(message: Message, context: Context) -> Message:
    """The client's number in the federation."""
    return Message(RecordDict({"who": MetricRecord({"client": context.node_config["client"]})}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """The client's model after its training."""
    from fl_lightning.engines.flower.private import Private

    received = {name: array.numpy() for name, array in message.content["arrays"].items()}
    private = Private(Path(str(context.node_config["folder"])))
    sent, num_examples = private.train(received)
    content = {
        "arrays": ArrayRecord({name: Array(array) for name, array in sent.items()}),
        "metrics": MetricRecord({"num-examples": num_examples}),
    }
    return Message(RecordDict(content), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Nothing: the federation evaluates models itself, and sends them so that clients have them."""
    return Message(RecordDict(), reply_to=message)
