"""Checkpoints: what is saved, verified and resharded."""
