"""Small modules of each framework for `crossvjp.testing`: an `mlp`, the same in all, and a `block`.

The block has parameters, state and dropout. Its dense layer has no bias: in front of a batch norm, the gradient of
one is rounding noise, of which a rule such as the sign makes something large.
"""
