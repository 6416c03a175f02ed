"""A client, curious by its first mod."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from net import Net, own_images, train
from torch.nn import functional as F

from fl_lightning.foreign.flower import curious_mod

app = ClientApp(mods=[curious_mod("recorded")])  # relative to where the SuperNode was started


@app.train()
def fit(message: Message, context: Context) -> Message:
    """Train the global model on the client's own images."""
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    images, labels = own_images(int(context.node_config["partition-id"]))
    train(net, images, labels, float(context.run_config["lr"]), int(context.run_config["local-epochs"]))
    metrics = MetricRecord({"num-examples": len(images)})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The global model's loss on the client's own images."""
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    images, labels = own_images(int(context.node_config["partition-id"]))
    with torch.no_grad():
        loss = F.cross_entropy(net(images), labels).item()
    metrics = MetricRecord({"loss": loss, "num-examples": len(images)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
