"""Direct enhancement: posterior sampling with a diffusion model as the prior (DDRM, DiffPIR)."""
