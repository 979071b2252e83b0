"""Opens what can be scored, continued or exported: a ticket, a run folder (its last ticket), a slim or dense folder."""

from pathlib import Path

from vit_rsst.tickets import rounds, slim_folder, ticket_file
from vit_rsst.tickets.ticket_file import Ticket


def open_ticket(what: Path) -> tuple[Path, Ticket]:
    """The ticket at a path, and its location.

    Raises:
        InputError: a run folder without a ticket.
        Damaged: the ticket, slim or dense folder does not exist, is damaged, or has another format.
    """
    if (what / slim_folder.CONFIG).is_file():  # a run folder has none
        return what, slim_folder.read(what)
    path = rounds.last_ticket(what) if what.is_dir() else what
    return path, ticket_file.load(path)
