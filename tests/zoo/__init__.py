"""Models and losses of many packages, each trained in several ways and in plain PyTorch. See zoo/run.py."""
