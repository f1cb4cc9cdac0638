"""Peers that mfengine's training step is measured against in the same run."""
