"""What several test files and the workers' scripts share: models, recipes, data, threads as workers."""
