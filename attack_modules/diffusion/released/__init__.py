"""Diffusion models that others released: their architectures, and readers of their weights."""
