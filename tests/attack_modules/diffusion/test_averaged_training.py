import torch

from attack_modules.diffusion.averaged_training import AveragedTraining


def training(seed: int) -> AveragedTraining:
    return AveragedTraining(torch.nn.Linear(2, 1), 1e-3, 0, 0.9, None, "linear.safetensors", seed)


def test_every_seed_draws_other_numbers_and_the_same_again() -> None:
    """Numbers in the upper bits of a seed would be lost on the CPU, without a word."""
    draws = [torch.rand(4, generator=training(seed).step_generator()) for seed in (0, 1, 1)]
    assert not torch.equal(draws[0], draws[1])
    torch.testing.assert_close(draws[1], draws[2], rtol=0, atol=0)
