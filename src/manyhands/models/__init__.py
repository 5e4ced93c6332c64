"""Builds, checks and compiles models."""
