"""The command lines: they are parsed here, before the imports that take seconds.

Nothing here imports torch, nor the package of the methods, which imports torch. That is why this is a package of its
own.
"""
