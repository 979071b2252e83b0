"""Reachability of a network service: one short probe, instead of a library's minutes of retries."""

import functools
import http.client
import os
import ssl
import sys
import urllib.error
import urllib.request

from vit_rsst.errors import first_line

SECONDS = 5.0


def unreachable(url: str) -> str:
    """Why a URL is unreachable; empty if a server answers, even with a refusal."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        return f"{url} returns HTTP {error.code}" if error.code >= 500 else ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):  # a library may trust certificates that Python does not
            return ""
        return f"{url} is unreachable: {first_line(reason) if isinstance(reason, Exception) else reason}"


@functools.cache
def prefer_cache() -> None:
    """Switches the Hub libraries to their cache if the Hub is unreachable, with a warning."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or not (why := unreachable(constants.ENDPOINT)):
        return
    print(f"warning: {why}; falling back to cached downloads.", file=sys.stderr, flush=True)
    os.environ["HF_HUB_OFFLINE"] = "1"  # for child processes
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
