"""What is measured, and asv's benchmarks of it.

asv imports this folder as a package of its own, of the present commit, beside the installed library of any commit: so
modules here import one another relatively, and of `clicktrain` and `baselines` only public names, through `optional`
where an old commit may lack them.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

# Only the library is ever installed. The rivals of the same commit lie in the sources that asv has built it from, in
# its environment, or, where the library is installed in place, beside it.
_places = [Path(sys.prefix) / "project"]
if (_library := find_spec("clicktrain")) is not None and _library.origin is not None:
    _places.append(Path(_library.origin).parents[1])
sys.path += [str(place) for place in _places if (place / "baselines").is_dir()][:1]
