"""One way to files and addresses."""
