"""To and from Hugging Face checkpoints."""
