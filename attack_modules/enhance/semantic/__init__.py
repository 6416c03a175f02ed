"""Semantic enhancement (MDE): a search for the initial noise of a class-conditional diffusion model."""
