"""Export: folders and files that others load, of tickets. `load` reads a slim folder back."""

from vit_rsst.tickets.slim_folder import load

__all__ = ["load"]
