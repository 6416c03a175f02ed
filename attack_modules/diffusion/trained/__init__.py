"""Diffusion models trained in this project: networks, training modules, data and model files."""
