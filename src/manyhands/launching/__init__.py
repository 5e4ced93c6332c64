"""Starts, supervises and restarts workers."""
