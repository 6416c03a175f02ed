"""What users of other systems have at hand, as public threads show it: each case ends in a record or a sentence."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.leak import leak
from attack_modules.analytic.observed_head import head_parameters, labels_in, training_knowledge
from attack_modules.threat_model.assumptions import Assumptions
from attack_modules.threat_model.observed import ObservedRound
from attack_modules.threat_model.plausibility import doubts
from cli import run
from fl_lightning.observation import Observation

State = dict[str, Tensor]
LABELS = (12, 5, 37)
CLASSES = 60
NET = f"""
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 5, padding=2)
        self.first = nn.Linear(8 * 8 * 8, 32)
        self.last = nn.Linear(32, {CLASSES})

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.convolution(x), 2))
        return self.last(F.relu(self.first(x.view(x.size(0), -1))))
"""


@pytest.fixture
def states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, State]:
    """One step of two peers with an image each, and of the observing client with one."""
    (tmp_path / "case_net.py").write_text(NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "case_net", raising=False)
    from case_net import Net

    torch.manual_seed(0)
    net = Net()
    images = F.interpolate(torch.rand(3, 3, 3, 3), (16, 16), mode="bilinear")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    sent = []
    for image, label in zip(images.split(1), LABELS, strict=True):
        gradient = torch.autograd.grad(F.cross_entropy(net(image), torch.tensor([label])), list(net.parameters()))
        sent.append({n: before[n] - 0.05 * g for n, g in zip(before, gradient, strict=True)})
    after = {name: sum(state[name] for state in sent) / 3 for name in before}
    return {"before": before, "after": after, "own": sent[2]}


class User:
    """Writes two model files and a client's own, and calls `observe`."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory = directory
        self.capsys = capsys

    def observes(self, files: dict[str, Path], *more: str) -> str:
        """All that was printed; in a refusal, the sentence."""
        given = [word for name, path in files.items() for word in (f"--{name}", str(path))]
        own = ["--own_weight", str(1 / 3)] if "own" in files and "--own_weight" not in more else []
        model = ["--model.class_path", "case_net.Net", "--image_shape", "3,16,16", "--out", "record"]
        status = run(["observe", *given, *own, *model, *more])
        printed = self.capsys.readouterr()
        assert (status == 0) == (self.directory / "record").exists()
        if status:
            (sentence,) = printed.err.splitlines()[-1:]
            assert sentence.startswith("Error: ")
            assert len(sentence) <= 407
            return sentence
        return printed.out + printed.err


@pytest.fixture
def user(tmp_path: Path, states: dict[str, State], capsys: pytest.CaptureFixture[str]) -> User:
    return User(tmp_path, capsys)


def saved(states: dict[str, State], directory: Path, change: Callable[[State], Any] = dict) -> dict[str, Path]:
    """Files of `torch.save`, of the states as a system saves them."""
    files = {name: directory / f"{name}.pt" for name in states}
    for name, state in states.items():
        torch.save(change(state), files[name])
    return files


def arrays(states: dict[str, State], directory: Path) -> dict[str, Path]:
    files = {name: directory / f"{name}.npz" for name in states}
    for name, state in states.items():
        np.savez(files[name], *[tensor.numpy() for tensor in state.values()])
    return files


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(tensor, expected[n]) for n, tensor in found.items())


def test_flowers_nameless_arrays_are_taken_in_order_and_wrong_shapes_named(
    user: User, states: dict[str, State], tmp_path: Path
) -> None:
    user.observes(arrays(states, tmp_path))
    seen = Observation.load(tmp_path / "record/observed/round_0000")
    assert same(seen.before, states["before"])
    assert same(seen.after, states["after"])
    (tmp_path / "record").rename(tmp_path / "kept")
    states["after"]["first.weight"] = states["after"]["first.weight"].T
    sentence = user.observes(arrays(states, tmp_path))
    assert "'first.weight' of `after` has the shape (512, 32), but the model's has (32, 512)" in sentence


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"model": s, "train_conf": {"round": 3}}, "the model's tensors are its 'model'"),  # NVFlare
        (lambda s: {"model_state_dict": s, "optimizer": None}, "are its 'model_state_dict'"),  # OpenFL
        (lambda s: {"state_dict": {f"model.{n}": t for n, t in s.items()}, "epoch": 1}, "'model.' of its names"),
        (lambda s: {f"module.{n}": t for n, t in s.items()}, "the prefix 'module.' of its names is left out"),
        (lambda s: {f"_orig_mod.{n}": t for n, t in s.items()}, "the prefix '_orig_mod.' of its names"),
    ],
)
def test_wrapped_states_are_unwrapped_and_it_is_said(
    user: User, states: dict[str, State], tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable, words: str
) -> None:
    with caplog.at_level("INFO"):
        user.observes(saved(states, tmp_path, change))
    assert words in caplog.text
    assert same(Observation.load(tmp_path / "record/observed/round_0000").after, states["after"])


def test_a_pickled_module_is_refused_with_what_to_do(user: User, states: dict[str, State], tmp_path: Path) -> None:
    from case_net import Net

    files = saved(states, tmp_path)
    torch.save(Net(), files["after"])
    assert "save the tensors alone: `torch.save(model.state_dict(), FILE)`" in user.observes(files)


def diverged(states: dict[str, State]) -> None:
    states["after"]["last.bias"][3] = torch.nan


def not_aggregated(states: dict[str, State]) -> None:
    states["after"] = states["before"]


def swapped(states: dict[str, State]) -> None:
    states["before"], states["after"] = states["after"], states["before"]


@pytest.mark.parametrize(
    ("spoil", "more", "words"),
    [
        (diverged, (), "the training diverged, or a file is damaged"),  # a DP strategy
        (not_aggregated, (), "nothing was trained between them"),  # a failed aggregation sends the old model again
        (dict, ("--own_weight", "1"), "above 0 and below 1"),
        (swapped, (), "as if the two were swapped"),
    ],
)
def test_what_is_no_round_is_refused_by_its_cause(
    user: User, states: dict[str, State], tmp_path: Path, spoil: Callable, more: tuple[str, ...], words: str
) -> None:
    spoil(states)
    assert words in user.observes(saved(states, tmp_path), *more)


def observed(states: dict[str, State], **more: Any) -> ObservedRound:
    from case_net import Net

    torch.manual_seed(1)
    given = {"own": states["own"], "own_weight": 1 / 3, "model": Net(), "image_shape": (3, 16, 16), **more}
    seen = Observation.from_models(states["before"], states["after"], **given)
    return ObservedRound(seen, Assumptions(client_lr=0.05, local_epochs=1))


def test_models_swapped_without_an_own_update_are_named(states: dict[str, State]) -> None:
    assert not list(doubts(observed(states, own=None, own_weight=0.0)))
    swapped(states)
    (doubt,) = doubts(observed(states, own=None, own_weight=0.0))
    assert "the models before and after are swapped" in doubt


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_precision_of_messages_is_named_as_the_limit(states: dict[str, State], dtype: torch.dtype) -> None:
    states["after"] = {name: tensor.to(dtype) for name, tensor in states["after"].items()}
    with pytest.warns(UserWarning, match="16-bit numbers, whose rounding is noise on the update"):
        observed(states)


def labels(seen: ObservedRound) -> list[int]:
    return labels_in(seen, seen.peers_update(), seen.observation.build_model()).tolist()


def test_a_head_alone_still_tells_labels_counts_and_features(states: dict[str, State]) -> None:
    whole = observed(states)
    heads = {k: {n: t for n, t in s.items() if n[:5] in ("first", "last.")} for k, s in states.items()}
    with pytest.warns(UserWarning, match="`after` holds the head alone.*images are right only if"):
        alone = observed(heads)
    with pytest.warns(UserWarning, match="holds the head alone"):
        nameless = observed({k: list(state.values()) for k, state in heads.items()})
    assert labels(alone) == labels(nameless) == labels(whole) == sorted(LABELS[:2])
    assert alone.observation.unchanged == {"convolution.weight", "convolution.bias"}
    features = []
    for seen in (whole, alone):
        model = seen.observation.build_model()
        parts = [head_parameters(part, model) for part in (seen.peers_update(), seen.observation.before)]
        features.append(leak(*parts, training_knowledge(seen, model)).features)
    torch.testing.assert_close(features[0], features[1])


def test_adam_is_recognised_and_momentum_can_be_told(states: dict[str, State]) -> None:
    states["after"] = {n: t - 0.001 * (t - states["after"][n]).sign() for n, t in states["before"].items()}
    seen = observed(states, own=None, own_weight=0.0)
    (doubt,) = doubts(seen)
    assert "it looks like Adam" in doubt
    assert not list(doubts(replace(seen, assumptions=replace(seen.assumptions, optimizer="Adam"))))
    told = Assumptions(client_lr=0.01, local_epochs=3, momentum=0.9)
    assert told.mean_rate == pytest.approx(0.01 * (1 + 1.9 + 2.71) / 3)


def test_a_plain_module_as_the_federations_model_is_told_of_its_wrapper(
    states: dict[str, State], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["fit", "--model", "FeatureInversion", "--federation.model", "case_net.Net"]) == 2
    hint = "`--federation.model WrappedClassifier --federation.model.module case_net.Net`"
    sentence = capsys.readouterr().err
    assert hint in sentence
    assert len(sentence) <= 407
