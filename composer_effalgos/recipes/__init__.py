"""Runs described in YAML: read, checked, built and resumed."""
