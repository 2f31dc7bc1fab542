"""`crossvjp migrate` and `crossvjp show`: saved parameters of one framework's model as a file for another's.

`command.py` runs the one from beginning to end, `listing.py` the other. `objects.py` finds the models that are named on
the command line, `report.py` prints, and `linen.py`, `nnx.py`, `haiku.py`, `equinox.py` say how each framework's values
stand in a file.
"""
