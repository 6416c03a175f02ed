"""Scores, tables and pictures of a run; the only folder that reads the ground truth."""
