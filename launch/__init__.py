"""Machines and money: the command line, launching ranks, reports."""
