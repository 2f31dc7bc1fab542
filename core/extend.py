"""What an adapter for another framework is made of, beside `Adapter`, `Boundary` and `register_adapter`."""

from ._ambient import Ambient as Ambient
from ._ambient import ambient as ambient
from ._ambient import entered as entered
from ._arrays import Static as Static
from ._arrays import is_inexact as is_inexact
from ._attachment import Attachment as Attachment
from ._attachment import Row as Row
from ._attachment import Running as Running
from ._attachment import Visit as Visit
from ._boundary import Body as Body
from ._boundary import run_and_publish as run_and_publish
from ._channel_variables import flat_name as flat_name
from ._channel_variables import held_channel as held_channel
from ._models import Models as Models
from ._partition import Partition as Partition
from ._paths import Path as Path
from ._paths import path_of as path_of
from ._select import Predicate as Predicate
from ._select import check_selected as check_selected
from ._select import predicate as predicate
from ._select import unknown_choice as unknown_choice
from ._sites import on_types as on_types
from ._sites import types_of as types_of
from ._subclass import named_like as named_like
from ._subclass import public_methods as public_methods
from ._subclass import subclass as subclass
