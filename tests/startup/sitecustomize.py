"""What every Python of the tests does first: Ray's workers, commands and ranks find it on their PYTHONPATH.

They are hundreds of processes, half of whose time goes into imports. Imports make objects by the hundred thousand, of
which none is garbage, and Python's collector, which looks at every 700 new ones, takes a tenth of that time.
"""

import gc

gc.set_threshold(20_000, 10, 10)
