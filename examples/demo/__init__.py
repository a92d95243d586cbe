"""The parts of the examples, one job a module; the scripts beside this folder put them in order."""
