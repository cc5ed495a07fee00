"""Hugging Face's library where its server cannot be reached."""

import contextlib
import urllib.error
import urllib.request
from collections.abc import Iterator

from huggingface_hub import constants

TIMEOUT = 5.0  # seconds without an answer


@contextlib.contextmanager
def quick_hugging_face() -> Iterator[None]:
    """Leaves the library to its cache if the server does not answer, which it would otherwise try for a minute."""
    earlier = constants.HF_HUB_OFFLINE
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # an answer too
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = earlier
