"""Prepares a corpus: from documents to token files."""
