"""The federation: clients, rounds, aggregation, and what a curious client sees of them. Knows nothing of attacks."""
