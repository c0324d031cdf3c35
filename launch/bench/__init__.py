"""How fast the kernels and a training step are on this machine's GPU, beside what a user would otherwise take: `shoestring bench`."""
