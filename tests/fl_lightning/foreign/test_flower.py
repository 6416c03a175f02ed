"""The mod on made messages: what a ClientApp is given by Flower, without Flower's processes."""

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attack_modules import FeatureInversion
from attack_modules.attack import Level
from attack_modules.threat_model.assumptions import Assumptions
from cli import main
from fl_lightning.defenses import Clipping, LocalDP
from fl_lightning.engines.flower import deployment
from fl_lightning.foreign import recorded_rounds
from fl_lightning.foreign.flower import curious_mod
from fl_lightning.observation import Observation
from fl_lightning.server_optimizers import FedAvg, FedAvgM, FlowerFedAdam, ServerOptimizer
from fl_lightning.state_files import read_state
from fl_lightning.storage import read_json

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.serverapp import Grid
from flwr.serverapp import strategy as strategies
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping
from flwr.supercore.task_identity import TaskIdentity

RUN = SimpleNamespace(run_id=12345678901234567890, node_id=5, node_config={"partition-id": 3})


@pytest.fixture(autouse=True)
def within_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower makes messages for the task of a process."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def message(kind: str, server_round: int | None, *layers: float) -> Message:
    config = {} if server_round is None else {"server-round": server_round}
    content = RecordDict({"arrays": arrays(layers), "config": ConfigRecord(config)})
    return Message(content, dst_node_id=1, message_type=kind)


def reply_to(asked: Message, *layers: float) -> Message:
    content = RecordDict({"metrics": MetricRecord({"num-examples": 8})})
    return Message(RecordDict({**content, "arrays": arrays(layers)}) if layers else content, reply_to=asked)


def arrays(layers: tuple[float, ...]) -> ArrayRecord:
    return ArrayRecord({f"layer{i}.weight": Array(np.float32([value])) for i, value in enumerate(layers)})


def values(path: Path) -> list[float]:
    return [float(tensor) for tensor in read_state(path).values()]


def test_models_and_own_updates_are_recorded_and_messages_unchanged(tmp_path: Path) -> None:
    mod = curious_mod(tmp_path)
    first, evaluation = message("train", 1, 1.0, 2.0), message("evaluate", 1, 3.0, 4.0)
    answers = {id(first): reply_to(first, 1.5, 2.5), id(evaluation): reply_to(evaluation)}
    for asked in (first, evaluation):
        before = asked.content["arrays"].object_id
        assert mod(asked, RUN, lambda m, _: answers[id(m)]) is answers[id(asked)]
        assert asked.content["arrays"].object_id == before
    later = message("train.head", 2, 3.0, 4.0)  # of the same model as the evaluation
    mod(later, RUN, lambda m, _: Message(Error(1, "it failed"), reply_to=m))
    last = message("evaluate", 2, 5.0, 6.0)
    mod(last, RUN, lambda m, _: reply_to(m))
    rounds = recorded_rounds(tmp_path / "run_12345678901234567890/client_3")
    assert [(recorded.round, recorded.num_examples) for recorded in rounds] == [(0, 8), (1, None)]
    assert values(rounds[0].before) == [1.0, 2.0]
    assert values(rounds[0].own) == [1.5, 2.5]
    assert values(rounds[0].after) == values(rounds[1].before) == [3.0, 4.0]
    assert (values(rounds[1].after), rounds[1].own) == ([5.0, 6.0], None)


def test_arrays_that_flower_numbered_are_nameless(tmp_path: Path) -> None:
    asked = message("evaluate", 0)
    asked.content["arrays"] = ArrayRecord([np.float32([i]) for i in range(11)])
    curious_mod(tmp_path)(asked, RUN, lambda m, _: reply_to(m))
    (path,) = tmp_path.rglob("global_0000.safetensors")
    assert [float(tensor) for tensor in read_state(path)] == list(range(11))


def test_the_client_answers_whatever_the_mod_meets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mod = curious_mod(tmp_path)
    without_round, without_model, query = message("train", None, 1.0), message("train", 1), message("query", 1)
    del without_model.content["arrays"]
    for asked in (without_round, without_model, query):
        answer = reply_to(asked)
        assert mod(asked, RUN, lambda *_: answer) is answer  # noqa: B023
    assert not list(tmp_path.rglob("*.safetensors"))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "no 'server-round'" in caplog.text

    def fails(*_: object) -> object:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        mod(message("train", 3, 1.0), RUN, fails)


def test_the_own_model_is_what_later_mods_make_of_it(tmp_path: Path) -> None:
    """Clipping and noise of Flower's local DP are in the aggregate, so they are in the own update."""
    private = LocalDpMod(clipping_norm=1.0, sensitivity=0.01, epsilon=1.0, delta=1e-5)
    asked = message("train", 1, 0.0, 0.0)
    client = ClientApp(mods=[curious_mod(tmp_path), private])
    client.train()(lambda m, _: reply_to(m, 3.0, 4.0))
    sent = client(asked, RUN).content["arrays"]
    (own,) = tmp_path.rglob("own_0000.safetensors")
    assert values(own) == [array.numpy().item() for array in sent.values()]
    assert values(own) == pytest.approx([0.6, 0.8], abs=0.3)
    assert values(own) != pytest.approx([0.6, 0.8], abs=1e-6)


class Loopback(Grid):
    """Four nodes of one ClientApp in this process, for Flower's own strategies."""

    run = set_run = create_message = push_messages = pull_messages = None  # strategies need none of them

    def __init__(self, app: ClientApp, **run_config: object) -> None:
        self.app = app
        self.run_config = run_config

    def get_node_ids(self) -> list[int]:
        return [10, 11, 12, 13]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        for asked in messages:
            node = asked.metadata.dst_node_id
            at = {"run_id": 1, "node_id": node, "node_config": {"partition-id": node - 10}}
            yield self.app(asked, SimpleNamespace(**at, run_config=self.run_config))


def update_of(client: int, server_round: int) -> np.ndarray:
    return np.random.default_rng([client, server_round]).normal(0, 1e-3, 50).astype(np.float32)


def train(asked: Message, context: SimpleNamespace) -> Message:
    client = context.node_config["partition-id"]
    model = asked.content["arrays"]["w"].numpy() - update_of(client, asked.content["config"]["server-round"])
    metrics = MetricRecord({"num-examples": 10 * (client + 1)})
    return Message(RecordDict({"arrays": ArrayRecord({"w": Array(model)}), "metrics": metrics}), reply_to=asked)


HALF = {"fraction_train": 0.5}
CLIPPED = DifferentialPrivacyClientSideFixedClipping(strategies.FedAvg(**HALF), 1e-9, 0.003, 2)


@pytest.mark.parametrize(
    ("strategy", "server", "server_lr", "mods"),
    [
        (strategies.FedAvg(**HALF), FedAvg(), 1.0, []),
        (strategies.FedAvgM(**HALF, server_learning_rate=0.5, server_momentum=0.9), FedAvgM(momentum=0.9), 0.5, []),
        (strategies.FedAdam(**HALF, eta=0.1), FlowerFedAdam(), 0.1, []),
        (CLIPPED, FedAvg(), 1.0, [fixedclipping_mod]),
    ],
    ids=["FedAvg", "FedAvgM", "FedAdam", "clipping"],
)
def test_flowers_own_strategies_are_undone_from_what_one_client_saw(
    tmp_path: Path,
    strategy: strategies.Strategy,
    server: ServerOptimizer,
    server_lr: float,
    mods: list[Callable[..., Message]],
) -> None:
    """Two of four clients train in each round; that all evaluate shows every aggregate to each of them."""
    app = ClientApp(mods=[curious_mod(tmp_path), *mods])
    app.train()(train)
    app.evaluate()(lambda asked, _: Message(RecordDict({"m": MetricRecord({"num-examples": 1})}), reply_to=asked))
    weights = np.random.default_rng(0).normal(0, 0.1, 50).astype(np.float32)
    strategy.start(Loopback(app), ArrayRecord({"w": Array(weights)}), num_rounds=3)
    models = {}
    for path in tmp_path.glob("run_1/client_*/global_*.safetensors"):
        models.setdefault(path.stem, read_state(path)["w"])
        assert torch.equal(models[path.stem], read_state(path)["w"])
    steps = [(models[f"global_000{t}"] - models[f"global_000{t + 1}"]) / server_lr for t in range(3)]
    for t in range(3):
        trained = list(tmp_path.glob(f"run_1/client_*/own_000{t}.safetensors"))
        assert len(trained) == 2
        shares = {path: read_json(path.with_suffix(".json"))["num_examples"] for path in trained}
        own = {path: models[f"global_000{t}"] - read_state(path)["w"] for path in trained}
        mean = sum(share * own[path] for path, share in shares.items()) / sum(shares.values())
        undone = server.undo([*(steps[s] for s in server.needed(t)), steps[t]], t)
        assert (undone - mean).norm() < 1e-3 * mean.norm()
        clients = {path: int(path.parent.name.removeprefix("client_")) for path in trained}
        whole = sum(float(np.linalg.norm(update_of(client, t + 1))) for client in clients.values())
        sent = sum(float(update.norm()) for update in own.values())
        assert sent == pytest.approx(0.006 if mods else whole, rel=1e-3)


@pytest.mark.slow
def test_the_attack_under_flowers_own_privacy_mods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The app to copy, its clients behind mods that clip and add noise: what the curious one reconstructs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(deployment.__file__).parent / "app"))
    import client_app
    from net import Net, own_images

    truth = {int(label): image for client in range(3) for image, label in zip(*own_images(client), strict=True)}
    norm, rates = 0.002, {"lr": 0.003, "local-epochs": 3}  # a fourteenth of what the largest update has
    everyone = strategies.FedAvg(min_train_nodes=4, min_evaluate_nodes=4, min_available_nodes=4)
    clipping = DifferentialPrivacyClientSideFixedClipping(everyone, 1e-9, norm, 4)

    def private(epsilon: float) -> Callable[..., Message]:
        return LocalDpMod(clipping_norm=norm, sensitivity=2 * norm, epsilon=epsilon, delta=1e-5)

    for name, mod, strategy, told, level, least in (
        ("clipping", fixedclipping_mod, clipping, Clipping(norm), Level.LIKELY, 30),
        ("little noise", private(1e5), everyone, LocalDP(norm, 1e5), Level.LIKELY, 27),
        ("noise", private(1e4), everyone, LocalDP(norm, 1e4), Level.NOT_READ, 0),
    ):
        app = ClientApp(mods=[curious_mod(tmp_path / name), mod])
        app.train()(client_app.fit)
        app.evaluate()(client_app.evaluate)
        torch.manual_seed(0)
        np.random.seed(0)
        strategy.start(Loopback(app, **rates), ArrayRecord(Net().state_dict()), num_rounds=1)
        recorded = ["--recorded", str(tmp_path / name / "run_1/client_3"), "--total_examples", "8"]
        main(["observe", *recorded, "--model.class_path", "net.Net", "--image_shape", "3,64,64",
              "--out", str(tmp_path / name / "record")])  # fmt: skip
        observation = Observation.load(tmp_path / name / "record/observed/round_0000")
        found = FeatureInversion().reconstruct(
            observation, Assumptions(client_lr=0.003, local_epochs=3, defenses=(told,))
        )
        assert found.verdict.level is level, name
        errors = [
            (image - truth[label]).square().mean()
            for image, label in zip(found.images, found.labels.tolist(), strict=True) if label in truth
        ]  # fmt: skip
        assert len(errors) == 6 or not least
        assert -10 * torch.stack(errors).log10().mean() > least
