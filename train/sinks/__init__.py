"""Where step records go."""
