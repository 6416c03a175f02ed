"""Images from the features that the closed form reads, each image on its own."""
