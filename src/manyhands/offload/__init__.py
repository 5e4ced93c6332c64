"""Keeps weights and optimizer state in RAM or on disk between their uses, and measures memory."""
