"""What is wrong with this machine or fabric, before money is spent: `shoestring doctor`."""
