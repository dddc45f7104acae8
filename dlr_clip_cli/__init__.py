"""The command lines: what is asked for is understood here, before the imports that take seconds.

Nothing here imports torch, nor the package of the methods, which imports torch: hence a package of its own.
"""
