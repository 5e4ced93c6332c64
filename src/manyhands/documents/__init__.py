"""TOML files that users write."""
