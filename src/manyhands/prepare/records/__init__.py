"""Records and the operations on them."""
