"""Data jobs: parallel processing of records with reproducible output."""
