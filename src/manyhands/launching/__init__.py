"""Starts workers, supervises them and starts them again."""
