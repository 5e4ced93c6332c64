"""Stores state between its uses, and measures memory."""
