"""What every Python of the tests does first: Ray's workers, commands and ranks find it on their PYTHONPATH.

They are some hundreds of processes, half of whose time goes into imports; and imports make objects by the hundred
thousand, of which none is garbage, and through which Python's collector goes again and again: a twentieth of all time.
"""

import gc

gc.set_threshold(500_000, 20, 100)
