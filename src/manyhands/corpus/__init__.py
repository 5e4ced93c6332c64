"""From documents to token files."""
