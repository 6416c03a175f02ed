"""Published diffusion models: architectures and loading of the released weights."""
