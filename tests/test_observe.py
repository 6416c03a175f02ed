"""The command `observe`: model files of every kind become one record, and what is none is a sentence."""

import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import read_image

from cli import main, settings_of
from fl_lightning.errors import AuditError, SettingError
from fl_lightning.foreign import Recorder
from fl_lightning.observation import Observation

NET = """
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self, width: int = 48, gate: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.gate = gate
        self.last = nn.Linear(width, 10)
        self.convolution = nn.Conv2d(3, 16, 5, padding=2)
        self.first = nn.Linear(16 * 8 * 8, width)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.convolution(x), 2))
        return self.last(self.gate(self.first(x.view(x.size(0), -1))))

def made(width: int = 48) -> Net:
    return Net(width)
"""
GUESSES = {
    "labels": "inferred", "label_counts": "inferred", "num_images": "inferred", "num_clients": "inferred",
    "client_lr": 0.01, "server_lr": 1, "local_epochs": 1, "batch_size": "null",
}  # fmt: skip

FIT = [
    *("--model", "FeatureInversion", "--federation.model", "WrappedClassifier"),
    *("--federation.model.module", "own_net.Net", "--trainer.accelerator", "cpu", "--trainer.logger", "false"),
    *("--trainer.max_steps", "20", "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"),
]

State = dict[str, Tensor]


@pytest.fixture
def states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, State]:
    """One step of two peers with an image each, and of the observing client with one."""
    (tmp_path / "own_net.py").write_text(NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_net", raising=False)
    from own_net import Net

    torch.manual_seed(0)
    net = Net()
    images = F.interpolate(torch.rand(3, 3, 3, 3), (16, 16), mode="bilinear")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    trained = []
    for image, label in zip(images.split(1), (2, 5, 7), strict=True):
        net.load_state_dict(before)
        gradient = torch.autograd.grad(F.cross_entropy(net(image), torch.tensor([label])), list(net.parameters()))
        names = [name for name, _ in net.named_parameters()]
        trained.append({n: before[n] - 0.01 * g for n, g in zip(names, gradient, strict=True)})
    after = {name: sum(state[name] for state in trained) / 3 for name in before}
    return {"before": before, "after": after, "own": trained[2]}


def to_pt(state: State, stem: Path) -> Path:
    torch.save(state, stem.with_suffix(".pt"))
    return stem.with_suffix(".pt")


def to_checkpoint(state: State, stem: Path) -> Path:
    content = {"epoch": 3, "state_dict": {f"model.{n}": t for n, t in state.items()} | {"loss.weight": torch.ones(3)}}
    torch.save(content, stem.with_suffix(".ckpt"))
    return stem.with_suffix(".ckpt")


def to_safetensors(state: State, stem: Path) -> Path:
    save_file({f"module.{name}": tensor for name, tensor in state.items()}, stem.with_suffix(".safetensors"))
    return stem.with_suffix(".safetensors")


def to_npz(state: State, stem: Path) -> Path:
    np.savez(stem.with_suffix(".npz"), *[tensor.numpy() for tensor in state.values()])
    return stem.with_suffix(".npz")


def to_named_npz(state: State, stem: Path) -> Path:
    np.savez(stem.with_suffix(".npz"), **{name: tensor.numpy() for name, tensor in state.items()})
    return stem.with_suffix(".npz")


Write = Callable[[State, Path], Path]


def observe(files: dict[str, Path], out: str = "record", model: str = "own_net.Net", **more: str) -> None:
    given = {f"--{name}": str(path) for name, path in files.items()}
    weight = {"--own_weight": str(1 / 3)} if "own" in files else {}
    model = {"--model.class_path": model, "--image_shape": "3,16,16", "--out": out}
    settings = {**given, **weight, **model, **{f"--{name}": value for name, value in more.items()}}
    main(["observe", *(word for option in settings.items() for word in option)])


def test_all_kinds_of_files_give_the_same_images(states: dict[str, State], tmp_path: Path) -> None:
    records, pictures = [], []
    for write in (to_pt, to_checkpoint, to_safetensors, to_npz, to_named_npz):
        folder = tmp_path / write.__name__
        folder.mkdir()
        observe({name: write(state, folder / name) for name, state in states.items()}, str(folder / "record"))
        records.append(Observation.load(folder / "record/observed/round_0000"))
        assert all(torch.equal(tensor, states["after"][name]) for name, tensor in records[-1].after.items())
        if write in (to_pt, to_safetensors, to_npz):
            told = [word for name, value in GUESSES.items() for word in (f"--knowledge.{name}", str(value))]
            places = ["--observation", str(folder / "record"), "--trainer.default_root_dir", str(folder)]
            main(["fit", *FIT, *told, *places])
            pictures.append([read_image(str(path)) for path in sorted(folder.rglob("images/*.png"))])
    for record in records[1:]:
        assert record.model == records[0].model
        assert all(torch.equal(tensor, records[0].own_update[name]) for name, tensor in record.own_update.items())
    assert [len(images) for images in pictures] == [2, 2, 2]
    assert all(torch.equal(a, b) for images in pictures[1:] for a, b in zip(images, pictures[0], strict=True))


@pytest.mark.parametrize("name", ["Net", "made"])
def test_what_is_printed_is_a_whole_command_but_for_the_words_in_capitals(
    name: str,
    states: dict[str, State],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, model = tmp_path / "a record", f"own_net.{name}"
    observe({name: to_pt(state, tmp_path / name) for name, state in states.items()}, str(folder), model)
    assert Observation.load(folder / "observed/round_0000").model["init_args"]["module"] == model
    lines = capsys.readouterr().out.splitlines()
    (command,) = [line for line in lines if line.startswith("python cli.py fit ")]
    for told in ("client_lr", "server_lr", "local_epochs", "batch_size"):
        assert command.count(f"--knowledge.{told} {told.upper()}") == 1
        assert sum(line.startswith(f"  {told.upper()}: ") for line in lines) == 1
        command = command.replace(told.upper(), str(GUESSES[told]))
    monkeypatch.chdir(Path(__file__).parent.parent)
    settings = settings_of(shlex.split(command)[2:])
    assert settings["observation"] == folder
    assert settings["federation"]["model"]["init_args"]["module"].__name__ == name
    assert settings["knowledge"]["client_lr"] == GUESSES["client_lr"]


def test_a_recorders_folder_gives_the_same_record(
    states: dict[str, State], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder(tmp_path / "recorded")
    recorder.global_model(states["before"], 2)
    recorder.own_model([*states["own"].values()], 2, num_examples=1)
    recorder.global_model(states["after"], 3)
    recorder.global_model(states["after"], 4)  # nothing was aggregated
    given = {"recorded": tmp_path / "recorded"}
    with pytest.raises(SettingError, match=r"trained on 1 examples.*`--total_examples`.*now None"):
        observe(given)
    with pytest.raises(SettingError, match="Give either `--before` and `--after`"):
        observe({"before": to_pt(states["before"], tmp_path / "before")})
    with pytest.raises(SettingError, match="leave out `--before`"):
        observe(given | {"before": tmp_path / "before.pt"})
    observe(given, total_examples="3")
    assert "Round 3 is left out: The models before and after round 3 are the same" in capsys.readouterr().out
    observe({name: to_pt(state, tmp_path / name) for name, state in states.items()}, "single", round="2")
    first, second = (Observation.load(tmp_path / record / "observed/round_0002") for record in ("record", "single"))
    assert (first.own_weight, first.model) == (pytest.approx(second.own_weight), second.model)
    for name in states["before"]:
        assert torch.equal(first.own_update[name], second.own_update[name])
        assert torch.equal(first.after[name], second.after[name])


def with_nan(states: dict[str, State]) -> None:
    states["after"]["first.bias"][3] = torch.nan


def not_trained(states: dict[str, State]) -> None:
    states["after"] = states["before"]


def of_other_classes(states: dict[str, State]) -> None:
    states["after"]["last.bias"] = torch.zeros(11)


def without_a_layer(states: dict[str, State]) -> None:
    del states["after"]["first.bias"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (with_nan, "NaN or infinity in 'first.bias'"),
        (not_trained, "are the same"),
        (of_other_classes, r"'last.bias' of `after` has the shape \(11,\)"),
        (without_a_layer, "it lacks first.bias"),
    ],
)
def test_models_that_are_no_round_are_refused(
    states: dict[str, State], tmp_path: Path, spoil: Callable[[dict[str, State]], None], words: str
) -> None:
    spoil(states)
    with pytest.raises(AuditError, match=words) as error:
        observe({name: to_pt(state, tmp_path / name) for name, state in states.items()})
    assert len(str(error.value)) <= 400
    assert not (tmp_path / "record").exists()


def test_files_and_settings_that_do_not_fit_are_refused(states: dict[str, State], tmp_path: Path) -> None:
    from own_net import Net

    files = {name: to_pt(state, tmp_path / name) for name, state in states.items()}
    torch.save(Net(), tmp_path / "pickled.pt")
    torch.save({"a": states["after"], "b": states["after"]}, tmp_path / "two.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"12")
    (tmp_path / "model.onnx").touch()
    observe(files)
    wrong: list[tuple[dict[str, Path], dict[str, str], str]] = [
        ({"after": tmp_path / "pickled.pt"}, {}, r"torch.save\(model.state_dict\(\), FILE\)"),
        ({"after": tmp_path / "two.pt"}, {}, r"2 of them \(a, b\)"),
        ({"after": tmp_path / "cut.safetensors"}, {}, "cannot be read"),
        ({"after": tmp_path / "model.onnx"}, {}, "no model file by its suffix"),
        ({"after": tmp_path / "missing.pt"}, {}, "There is no file"),
        ({}, {"own_weight": "1"}, "below 1"),
        ({}, {"image_shape": "null"}, "Give `--image_shape`"),
        ({}, {"image_shape": "1,16,16"}, "fails on 2 random images"),
        ({}, {"head": "convolution"}, "at the end of Net are first, last"),
        ({}, {}, "exists. Give another `--round`"),
        ({}, {"round": "1", "mean": "0.5,0.5,0.5"}, "is of another model"),
        ({}, {"model.class_path": "own_net.Nat"}, "has no attribute 'Nat'"),
        ({}, {"model.init_args.depth": "3"}, "depth"),
        ({}, {"model.init_args.gate": "torch.nn.functional.gelu"}, "a record cannot hold"),
    ]
    for changed, more, words in wrong:
        with pytest.raises(AuditError, match=words) as error:
            observe({**files, **changed}, **more)
        assert len(str(error.value)) <= 400
    observe(files, round="1")
    assert (tmp_path / "record/observed/round_0001.json").exists()
