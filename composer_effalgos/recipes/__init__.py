"""YAML recipes: reading, validation, building and resuming runs."""
