"""The app to copy: Flower's FedAvg and a mod, from its processes to the peers' images."""

import importlib.util
from pathlib import Path

import pytest

from attack_modules import FeatureInversion
from attack_modules.threat_model.assumptions import Assumptions
from cli import main
from fl_lightning.engines.flower import deployment
from fl_lightning.engines.flower.deployment import Deployment
from fl_lightning.observation import Observation

APP = Path(deployment.__file__).parent / "app"


@pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="needs the extra `flower`")
@pytest.mark.slow
def test_its_curious_client_reconstructs_what_its_peers_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nodes = [{"partition-id": client, "num-partitions": 4} for client in range(4)]
    (tmp_path / "flower").mkdir()
    with Deployment(tmp_path / "flower", nodes, tmp_path / "logs") as running:
        running.submit(APP, {"num-rounds": 1})
        last = "recorded/run_*/client_3/global_0001.json"
        running.wait(lambda: list(tmp_path.glob(last)) != [], "finish the round", 600)
    (found,) = tmp_path.glob(last)
    monkeypatch.syspath_prepend(str(APP))
    model = ["--model.class_path", "net.Net", "--image_shape", "3,64,64"]
    main(["observe", "--recorded", str(found.parent), "--total_examples", "8", *model, "--out", "record"])
    observation = Observation.load(tmp_path / "record/observed/round_0000")
    assert observation.own_weight == 0.25

    from net import own_images

    truth = {int(label): image for client in range(3) for image, label in zip(*own_images(client), strict=True)}
    result = FeatureInversion().reconstruct(observation, Assumptions(client_lr=0.003, local_epochs=3))
    labels = result.labels.tolist()
    assert sorted(labels) == sorted(truth)
    errors = [(image - truth[label]).square().mean() for image, label in zip(result.images, labels, strict=True)]
    psnr = [float(-10 * error.log10()) for error in errors]
    assert sum(psnr) / len(psnr) > 25
