"""The peers' local training, simulated so that it can be differentiated and divided among processes."""
