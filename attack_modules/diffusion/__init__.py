"""Diffusion models of images: one that we train, and readers of released ones."""
