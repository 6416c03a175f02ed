"""Enhancement of reconstructed images, after the attack and apart from it."""
