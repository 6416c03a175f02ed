"""The audit: many attacks over settings and defences, and one report of them. It reads results only."""
