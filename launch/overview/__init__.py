"""Runs on this disk: a table of all of them, and two beside each other."""
