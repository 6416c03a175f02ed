"""Images whose simulated training gives the observed update: the attack of arXiv 2410.04661."""
