"""Direct enhancement: posterior sampling with a diffusion prior (DDRM, DiffPIR)."""
