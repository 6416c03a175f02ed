import copy
import gc
import weakref

import pytest
import torch
from torch.nn import functional as F

from fl_lightning import client
from fl_lightning.client import ClientModule, ClientTask, LocalTraining, local_update, parameters
from fl_lightning.data import ImageSet
from fl_lightning.errors import SettingError
from fl_lightning.models import LeNet5


@pytest.fixture
def task() -> ClientTask:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    return ClientTask(LeNet5(4, (3, 16, 16)), ImageSet(pixels, torch.arange(6) % 4), seed=3)


def test_one_full_batch_step_is_one_centralised_sgd_step(task: ClientTask) -> None:
    result = local_update(task, LocalTraining(lr=0.1, local_epochs=1))
    central = copy.deepcopy(task.model)
    optimizer = torch.optim.SGD(central.parameters(), lr=0.1)
    F.cross_entropy(central(task.images.images), task.images.labels).backward()
    optimizer.step()
    for name, before in parameters(task.model).items():
        torch.testing.assert_close(result.update[name], before - central.get_parameter(name).detach())
    assert result.num_examples == 6


def test_mini_batches_momentum_and_weight_decay_train_as_configured(task: ClientTask) -> None:
    training = LocalTraining(lr=0.05, local_epochs=2, batch_size=6, momentum=0.9, weight_decay=0.01)
    central = copy.deepcopy(task.model)
    optimizer = torch.optim.SGD(central.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(central(task.images.images), task.images.labels).backward()
        optimizer.step()
    update = local_update(task, training).update
    for name, before in parameters(task.model).items():
        torch.testing.assert_close(update[name], before - central.get_parameter(name).detach(), atol=1e-6, rtol=1e-4)


def test_update_is_a_pure_function(task: ClientTask) -> None:
    training = LocalTraining(local_epochs=2, batch_size=2)
    before = copy.deepcopy(task.model.state_dict())
    torch.manual_seed(1)
    first = local_update(task, training).update
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = local_update(task, training).update
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())
    other = local_update(ClientTask(task.model, task.images, seed=4), training).update
    assert any(not torch.equal(first[name], other[name]) for name in first)  # another order of mini-batches


def test_a_trained_model_does_not_wait_for_a_garbage_collection(
    task: ClientTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    class Watched(ClientModule):
        def on_train_end(self) -> None:
            trained.append(weakref.ref(self.model))

    monkeypatch.setattr(client, "ClientModule", Watched)
    gc.disable()
    try:
        local_update(task, LocalTraining(momentum=0.9))
    finally:
        gc.enable()
    assert [model() for model in trained] == [None]


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="lr > 0"):
        LocalTraining(lr=0)


def test_refused_training_is_a_short_sentence_whatever_else_is_set() -> None:
    with pytest.raises(SettingError, match="but got lr=-1") as error:
        LocalTraining(lr=-1.0, class_weights=[1.0] * 1000)
    assert len(str(error.value)) <= 400
