"""How bytes travel between workers; the only package that imports torch.distributed's collectives."""
