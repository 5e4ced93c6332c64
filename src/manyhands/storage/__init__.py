"""One interface to files and addresses."""
