"""What an adapter for another framework is made of, beside `Adapter`, `Boundary` and `register_adapter`."""

from ._arrays import Static as Static
from ._arrays import is_inexact as is_inexact
from ._boundary import Body as Body
from ._boundary import run_and_publish as run_and_publish
from ._channel_variables import flat_name as flat_name
from ._channel_variables import held_channel as held_channel
from ._partition import Partition as Partition
from ._paths import Path as Path
from ._select import Predicate as Predicate
from ._select import check_selected as check_selected
from ._select import predicate as predicate
from ._select import unknown_choice as unknown_choice
