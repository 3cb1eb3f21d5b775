"""Read by every Python that the tests start: torch and Ray are half a million objects, among which it would look for garbage as it starts.

That takes more than a tenth of such a process's time, and the tests start hundreds of them.
"""

import gc

gc.set_threshold(100_000, 50, 100)
