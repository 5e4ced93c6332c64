"""Arrays on a grid of named dimensions, as zarr stores and netCDF files hold them."""
