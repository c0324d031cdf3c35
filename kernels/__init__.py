"""One tensor operation per file: a plain-torch reference, and later the kernel that replaces it on a GPU."""
