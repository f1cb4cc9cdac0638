"""Peers of mfengine's training step, measured in the same run."""
