"""Tools that make a data set from others, or describe one: split, merge, mend, statistics, and the download of a ready one.

Called by ``raydetr data split``, ``merge``, ``check --fix``, ``stats`` and ``fetch``. None of them changes a data set in place.
"""
