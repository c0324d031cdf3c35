"""`shoestring plan`: which layout of a cluster trains this model for the least money, what that takes, and why not another. Projected."""
