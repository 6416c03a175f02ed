"""Post-attack image enhancement that uses only the reconstructed images and their labels."""
