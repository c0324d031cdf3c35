"""Sharded optimizers: one contract, two engines."""
