"""Diagnoses machines and runs."""
