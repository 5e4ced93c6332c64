"""Islands that meet in a folder or an object store: files of rounds and their codec, leases, outages of the store."""
