"""The application: what train.py, predict.py and the command dlr-clip do with a command line that is understood.

It names no method. Of this package it is the one room that knows the datasets, and it needs the project's own toolbox;
whoever imports the methods for an upstream Dassl does not import it.
"""
