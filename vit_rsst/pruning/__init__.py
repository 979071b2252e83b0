"""Pruning: methods decide (`plan`, `methods/`), the controller acts (`controller`).

Importing this package loads no torch, so that a recipe can be checked in a moment.
"""
