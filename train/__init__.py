"""The model, its data, optimizer schedule, checkpoints, costs, and the training loop."""
