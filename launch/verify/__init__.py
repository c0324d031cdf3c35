"""`shoestring verify`: a certificate that every layout computes what one process computes."""
