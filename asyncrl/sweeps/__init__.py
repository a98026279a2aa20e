"""`asyncrl sweep`: the same training over a product of settings. trials.py says which runs, processes.py runs them,
results.py says what they came to."""
