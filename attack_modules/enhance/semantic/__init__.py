"""Semantic enhancement (MDE): optimisation of a class-conditional diffusion model's initial noise."""
