"""Runs a job and publishes its output."""
