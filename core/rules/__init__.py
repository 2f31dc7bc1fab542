"""The catalogue: published backward rules, one family a file."""
