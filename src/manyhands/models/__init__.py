"""What a model may contain, and how it is built."""
