"""Saved parameters: Haiku pickles, npz, msgpack, safetensors, Orbax checkpoints and Equinox's `.eqx`, read and written.

One file a format. `read` finds out the format by the content, `write` by the suffix; neither changes a dtype, and what
is written appears whole or not at all, and never in the place of something else.
"""

from crossvjp.adapters.files._errors import FileError as FileError
from crossvjp.adapters.files._formats import FORMATS as FORMATS
from crossvjp.adapters.files._formats import format_for as format_for
from crossvjp.adapters.files._formats import format_of as format_of
from crossvjp.adapters.files._reading import Entry as Entry
from crossvjp.adapters.files._reading import entries as entries
from crossvjp.adapters.files._reading import read as read
from crossvjp.adapters.files._writing import refuse_existing as refuse_existing
from crossvjp.adapters.files._writing import write as write
