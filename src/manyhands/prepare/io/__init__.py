"""Input and output files of data jobs."""
