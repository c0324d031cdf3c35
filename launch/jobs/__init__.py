"""`shoestring launch`: a run on this machine, under torchrun, as a Slurm job, on Kubernetes. --dry-run shows what would be sent."""
