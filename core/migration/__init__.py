"""Moves trained parameters and state between the layers of different frameworks."""
