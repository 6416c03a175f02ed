"""Diffusion models of images: the interfaces that attacks and enhancements use."""
