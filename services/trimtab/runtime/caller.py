"""Who this process is to the services it calls, where no config says so: from the environment that its pod sets.

    TRIMTAB_CLIENT_TLS_CA, TRIMTAB_CLIENT_TLS_CERT, TRIMTAB_CLIENT_TLS_KEY, TRIMTAB_CLIENT_TOKEN_FILE,
    TRIMTAB_CLIENT_TLS_SERVER_NAME (the name in the services' certificates, where addresses are numbers)

With none of them calls are in the clear, as on one machine.
"""

from __future__ import annotations

import os
from typing import Any

from trimtab.runtime.peers import PeerConfig
from trimtab_client import ChannelOptions

PREFIX = "TRIMTAB_CLIENT_"


def channel_options() -> ChannelOptions:
    """A client's defaults with this process's credentials. pydantic's ValidationError for half a pair of files."""
    names = ("tls_ca", "tls_cert", "tls_key", "tls_server_name", "token_file")
    given: dict[str, Any] = {name: os.environ.get(PREFIX + name.upper()) or None for name in names}
    return PeerConfig(**given).options()
