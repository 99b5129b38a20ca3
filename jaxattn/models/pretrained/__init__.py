"""Published models: their configs, and the names of their weights."""
