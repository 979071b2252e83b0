"""Pruning: methods decide (`plan`, `methods/`), the controller acts (`controller`).

Importing this package does not import torch, so that recipes can be checked quickly.
"""
