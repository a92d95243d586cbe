"""The parts of ``quickstart.py``, one job a module; ``quickstart.py`` puts them in order."""
