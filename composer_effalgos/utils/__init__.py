"""Errors, range checks, files and text."""
