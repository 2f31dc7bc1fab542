"""`crossvjp tour`: one rule object trains the same network to the same parameters in five frameworks.

Read `rule.py`, then the network in your framework (`plain.py`, `linen.py`, `nnx.py`, `haiku.py`, `equinox.py`);
`network.py` says what they share, `train.py` and `command.py` run them, `verdict.py` judges.
"""
