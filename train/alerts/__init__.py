"""What somebody should know of at once: rules that look at every step, and the channels by which their alerts go out."""
