"""Diffusion models of images, with the interfaces that attacks and enhancement methods use."""
