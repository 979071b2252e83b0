"""Whether a service on the network answers: asked once and briefly, before a library tries again for minutes."""

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
    """Why nothing works at an address; empty when something answers there, be it a refusal."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        return f"{url} answers {error.code}" if error.code >= 500 else ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):  # libraries may know certificates that are unknown here
            return ""
        return f"{url} does not answer: {first_line(reason) if isinstance(reason, Exception) else reason}"


@functools.cache
def prefer_cache() -> None:
    """Makes the Hub's libraries look into their cache at once where the Hub does not answer; says so."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or not (why := unreachable(constants.ENDPOINT)):
        return
    print(f"warning: {why}; using what earlier downloads left in the cache.", file=sys.stderr, flush=True)
    os.environ["HF_HUB_OFFLINE"] = "1"  # for processes to come
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
