"""Recorded boots of real machines, booted once more in virtual time, and what came out beside what was recorded.

``recorded`` reads a directory of boots, ``machine`` makes the machine that was booted, ``spans``, ``calibration`` and
``fit`` take what things cost from the boots with two CPUs, ``comparison`` holds the figures against each other, and
``verify`` does all of it.
"""
