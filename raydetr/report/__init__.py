"""The report of runs and searches: one HTML file that needs no network.

``report`` reads what runs and searches left in their folders and draws it. The command line and the demo call it.
"""
