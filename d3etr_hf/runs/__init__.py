"""A run's folder: whose it is, its configuration, its environment."""
