"""Enhancement of reconstructed images after an attack, from those images and labels alone."""
