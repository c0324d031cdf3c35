"""`shoestring rehearse`: the step of any rank of a job of thousands, run here without GPUs and without the others."""
