"""The server's optimisers against PyTorch's and Flower's, over an interruption, and undone by the attacker."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attack_modules.threat_model.knowledge import Knowledge, KnowledgeError
from attack_modules.threat_model.observed import ObservedRounds
from fl_lightning.client import LocalTraining
from fl_lightning.data import FederatedData
from fl_lightning.engines import InProcess
from fl_lightning.errors import SettingError
from fl_lightning.federation import Federation
from fl_lightning.models import ClassifierFactory
from fl_lightning.observation import Observation
from fl_lightning.record import Record
from fl_lightning.server_optimizers import FedAdam, FedAvg, FedAvgM, FedYogi, FlowerFedAdam, ServerOptimizer
from fl_lightning.storage import StorageError

ALL = [FedAvg(), FedAvgM(0.8), FedAdam(), FedYogi(), FlowerFedAdam()]


@pytest.mark.parametrize("optimizer", [*ALL, FedAdam(tau=1e-8)], ids=str)
def test_steps_are_undone_from_all_that_was_seen(optimizer: ServerOptimizer) -> None:
    generator, memory, steps = torch.Generator().manual_seed(0), {}, []
    updates = 1e-5 * (2 + torch.randn(4, 300, generator=generator))
    signs = isinstance(optimizer, FedAdam) and optimizer.tau < 1e-7  # later, two updates may give one step
    for round_, update in enumerate(updates[: 1 if signs else 4]):
        steps.append(optimizer.step(update, memory, round_))
        known = [steps[earlier] for earlier in optimizer.needed(round_)]
        found = optimizer.undo([*known, steps[round_]], round_)
        assert (found - update).norm() < (1e-4 if signs else 1e-5) * update.norm()
    assert ServerOptimizer.restored(optimizer.describe()) == optimizer


def test_momentum_is_that_of_sgd_and_adam_that_of_the_paper() -> None:
    weight = torch.zeros(3, requires_grad=True)
    sgd, memory, updates = torch.optim.SGD([weight], 1.0, momentum=0.8), {}, torch.randn(3, 3)
    total = sum(FedAvgM(0.8).step(update, memory, round_) for round_, update in enumerate(updates))
    for update in updates:
        weight.grad = update.clone()
        sgd.step()
    torch.testing.assert_close(-weight.detach(), total)
    memory = {}
    first, second = (
        FedAdam(0.9, 0.99, 0.1).step(torch.tensor([u]), memory, t).item() for t, u in enumerate((1.0, 2.0))
    )
    assert first == pytest.approx(0.1 / ((0.99 * 0.01 + 0.01) ** 0.5 + 0.1))
    assert second == pytest.approx((0.09 + 0.2) / ((0.99 * 0.0199 + 0.04) ** 0.5 + 0.1))


def test_flowers_fed_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    strategies = pytest.importorskip("flwr.serverapp.strategy")
    flwr = pytest.importorskip("flwr.app")
    monkeypatch.setattr(strategies.FedAvg, "aggregate_train", lambda self, number, mean: (mean, None))
    strategy, memory = strategies.FedAdam(eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3), {}
    weights = torch.zeros(4)
    for round_, update in enumerate(torch.tensor([[1e-3, -2e-3, 3e-4, 0], [5e-4, 1e-3, 0, 1e-5]])):
        strategy.current_arrays = {"w": weights.numpy()}
        mean = flwr.ArrayRecord({"w": flwr.Array((weights - update).numpy())})
        after = strategy.aggregate_train(round_ + 1, mean)[0]["w"].numpy()
        weights = weights - 0.1 * FlowerFedAdam().step(update, memory, round_)
        torch.testing.assert_close(weights.numpy(), after.astype("float32"), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("optimizer", [FedAvgM(), FedAdam()], ids=str)
def test_a_told_optimizer_is_undone_in_any_observed_round(
    noise_images: type[FederatedData],
    linear_classifier: ClassifierFactory,
    tmp_path: Path,
    relative_error: Callable,
    optimizer: ServerOptimizer,
) -> None:
    federation = Federation(linear_classifier, LocalTraining(0.02, 1), rounds=2, server=optimizer, server_lr=0.1)
    data = noise_images(num_clients=2, images_per_client=1, image_size=16)
    rounds = ObservedRounds(Knowledge(), federation, data, tmp_path)
    rounds.summary()
    rounds.prepare_data()
    rounds.setup()
    (seen,) = rounds.rounds
    assert (seen.observation.round, [o.round for o in seen.earlier]) == (1, [0])
    model = seen.observation.build_model()
    again = Federation(linear_classifier, federation.client)
    again.initial_model = lambda _: model  # the same round under plain averaging
    plain = ObservedRounds(Knowledge(), again, data, tmp_path / "plain")
    plain.prepare_data()
    plain.setup()
    assert relative_error(seen.peers_update(), plain.rounds[0].peers_update()) < 1e-3
    untold = replace(seen, assumptions=replace(seen.assumptions, server=FedAvg()))
    assert relative_error(untold.peers_update(), plain.rounds[0].peers_update()) > 0.3


def test_momentum_goes_on_after_an_interruption(
    noise_images: type[FederatedData], linear_classifier: ClassifierFactory, tmp_path: Path
) -> None:
    class Interrupted(InProcess):
        def train(self, *arguments: object) -> Iterator:
            if Record(tmp_path / "halves").checkpoint.exists():
                raise SystemExit(1)
            return super().train(*arguments)

    def run(name: str, engine: InProcess | None = None) -> dict[str, torch.Tensor]:
        data = noise_images(num_clients=2, images_per_client=1, image_size=16)
        federation = Federation(linear_classifier, LocalTraining(0.02, 1), rounds=2, server=FedAvgM(), engine=engine)
        federation.run(data, tmp_path / name)
        return Observation.load(Record(tmp_path / name).observation(1)).after

    with pytest.raises(KeyboardInterrupt):
        run("halves", Interrupted())
    halves, whole = run("halves"), run("whole")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in halves.items())


def test_without_the_rounds_it_needs_it_is_a_sentence(noise_images: type[FederatedData], tmp_path: Path) -> None:
    data = noise_images(num_clients=5, images_per_client=1, image_size=16)
    federation = Federation(rounds=8, clients_per_round=2, server=FedAdam())
    with pytest.raises(KnowledgeError, match=r"FedAdam keeps something.*which the attacker did not observe") as error:
        ObservedRounds(Knowledge(), federation, data, tmp_path).summary()
    assert len(str(error.value)) <= 400
    federation = Federation(rounds=8, clients_per_round=2, server=FedAdam(), broadcast="all")
    ObservedRounds(Knowledge(), federation, data, tmp_path).summary()
    for bad in (lambda: FedAvgM(1.0), lambda: FedAdam(tau=0.0), lambda: FedYogi(beta_2=1.0)):
        with pytest.raises(SettingError):
            bad()
    with pytest.raises(StorageError, match="no such class is loaded"):
        ServerOptimizer.restored({"class_path": "os.system", "init_args": {}})
