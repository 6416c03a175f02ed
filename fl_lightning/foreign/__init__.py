"""Rounds of other systems: what a running client keeps of them."""

from fl_lightning.foreign.recorder import RecordedRound, Recorder, recorded_rounds

__all__ = ["RecordedRound", "Recorder", "recorded_rounds"]
