"""Diffusion models that this project trains: networks, training, and their files."""
