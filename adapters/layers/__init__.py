"""How the layers of each framework keep their arrays, one table a framework."""
