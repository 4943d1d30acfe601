"""Logging, metrics and progress."""
