"""What takes memory beside the tensors that are in use, and what a full disk says."""

import ctypes
import errno
import platform
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from fl_lightning import allocation, storage
from fl_lightning.allocation import MAPPED_LIBRARY, SMAPS, release_freed_memory, release_libraries, release_pages
from fl_lightning.data import FederatedData
from fl_lightning.federation import Federation
from fl_lightning.models import LeNet5
from fl_lightning.observation import build_model, describe_model
from fl_lightning.record import Record
from fl_lightning.storage import in_a_file, load_checkpoint, save_checkpoint

SIZE = 2**26


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone tells what it frees")
def test_freed_memory_is_returned_where_it_is_between_what_is_held() -> None:
    freed, held = torch.ones(SIZE // 4), torch.ones(1000)
    del freed
    release_freed_memory()
    again, held_too = torch.ones(SIZE // 4), torch.ones(1000)
    full = resident()
    del again
    release_freed_memory()
    assert full - resident() > SIZE // 2
    assert held.sum() == held_too.sum() == 1000


@pytest.mark.skipif(not SMAPS.exists(), reason="Linux alone tells what is mapped")
def test_code_of_libraries_is_given_back_and_read_again() -> None:
    parts = [(int(part["start"], 16), int(part["end"], 16)) for part in MAPPED_LIBRARY.finditer(SMAPS.read_text())]
    start, end = max(parts, key=lambda part: part[1] - part[0])
    content = ctypes.string_at(start, min(end - start, SIZE // 2))
    full = resident()
    release_libraries()
    assert full - resident() > len(content) // 2 > 2**20
    assert ctypes.string_at(start, len(content)) == content


@pytest.mark.skipif(not SMAPS.exists(), reason="Linux alone maps files so")
def test_tensors_in_a_file_need_no_memory(tmp_path: Path) -> None:
    mapped = in_a_file({"weight": torch.arange(SIZE // 4), "scalar": torch.tensor(2.0)}, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    total, full = mapped["weight"].sum(), resident()
    release_pages(mapped.values())
    assert full - resident() > SIZE
    assert total == mapped["weight"].sum() == torch.arange(SIZE // 4).sum()


def test_a_large_model_is_trained_as_a_small_one(
    tmp_path: Path, noise_images: type[FederatedData], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = noise_images(num_clients=2, images_per_client=2, image_size=16)
    for name in ("small", "large"):
        Federation(rounds=2, seed=1).run(data, tmp_path / name)
        monkeypatch.setattr(allocation, "LARGE", 1)
    small, large = (Record(tmp_path / name).observation(1).with_suffix(".safetensors") for name in ("small", "large"))
    assert small.read_bytes() == large.read_bytes()
    assert not list(tmp_path.rglob("*model*"))


def test_a_model_of_a_state_initialises_no_parameters() -> None:
    model = LeNet5(10, (3, 16, 16))
    before = torch.get_rng_state()
    built = build_model(describe_model(model), model.state_dict())
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in built.state_dict().items())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is simulated by /dev/full")
@pytest.mark.parametrize("size", [10, 10**6])
def test_a_full_disk_is_named_as_the_cause(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(storage, "atomic_path", lambda path: nullcontext(Path("/dev/full")))
    with pytest.raises(OSError, match="No space left") as refusal:
        save_checkpoint(Path("last.ckpt"), {"model": torch.zeros(size)})
    assert refusal.value.errno == errno.ENOSPC


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.ckpt", {"model": {"weight": torch.arange(5.0)}, "rounds_done": 3})
    found = load_checkpoint(tmp_path / "last.ckpt")
    assert found["rounds_done"] == 3
    assert torch.equal(found["model"]["weight"], torch.arange(5.0))
