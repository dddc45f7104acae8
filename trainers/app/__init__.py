"""The application: what train.py, predict.py and the command dlr-clip do with a command line once it is parsed.

The application names no method. It is the one part of the package `trainers` that knows the datasets, and it needs the
project's own toolbox. Whoever imports the methods for an upstream Dassl does not import the application.
"""
