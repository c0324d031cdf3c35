"""The commands of the command line, in tables: what each is called, its arguments, its help, and what it runs."""
