"""Text into samples: sources, tokenizer, cache, and the order in which they are read."""
