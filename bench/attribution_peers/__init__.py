"""Estimators of influence of other packages; each module runs in a virtual environment of its own, see ``job``."""
