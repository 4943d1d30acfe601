"""Offline commands on datasets: the `fqgan-data` command."""
