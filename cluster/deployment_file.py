"""The state file: the addresses and secrets of a deployment, as JSON in the state folder.

`arriero up` writes the file; all other commands read the file. Knows the fields and the place of
the file; knows nothing of Ray and of the processes.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from arriero.shards.errors import SpecError

TOKEN_FILE = "ARRIERO_ADMIN_TOKEN_FILE"
"""Environment variable: file with Admin's token, where a secret store keeps the token."""
_FILE = "deployment.json"
_SHORTEST_TOKEN = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """A deployment that is starting or serving.

    Attributes:
        ray_address: host:port of the cluster's GCS; "" while a local cluster starts.
        node_address: IP address of the driver in the cluster's network; None lets Ray choose.
        gateway: host:port of a gateway's gRPC; "" until the gateway listens.
        http: host:port of the gateway's HTTP; "" for none.
        console: URL of the gateway's console; "" for none.
        admin: host:port of Admin; "" until Admin listens.
        admin_token: bearer token of Admin.
        admin_ca: PEM of the certificate authorities of Admin; "" without TLS.
        admin_name: host name in Admin's certificate; "" for the host of `admin`.
        local_session: session id of the processes that `up` started; None on a joined cluster.
        local_folder: temporary folder of the local cluster; None on a joined cluster.
        ray_token: Ray's token of the local cluster; "" on a joined cluster, for which the user has
            the token.
        stop_s: seconds within which groups and gateways drain and end.
    """

    ray_address: str
    node_address: str | None = None
    gateway: str = ""
    local_session: int | None = None
    local_folder: str | None = None
    http: str = ""
    admin: str = ""
    admin_token: str = ""
    admin_ca: str = ""
    admin_name: str = ""
    ray_token: str = ""
    stop_s: float = 30.0
    console: str = ""


def state_folder(folder: Path | None) -> Path:
    """Folder of the state file.

    Args:
        folder: None for $ARRIERO_STATE, else $XDG_STATE_HOME/arriero, else ~/.local/state/arriero.
    """
    if folder is not None:
        return folder.absolute()
    if path := os.environ.get("ARRIERO_STATE"):
        return Path(path).absolute()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "arriero"


def admin_token() -> str:
    """Token for the Admin of a new deployment: from the file in `TOKEN_FILE`, else a random one.

    Raises:
        SpecError: see `read_token`.
    """
    path = os.environ.get(TOKEN_FILE)
    return read_token(Path(path)) if path else secrets.token_urlsafe(32)


def read_token(path: Path) -> str:
    """Admin's token in a file.

    Raises:
        SpecError: the token is too short to keep others out.
        OSError: the file cannot be read.
    """
    token = path.read_text(encoding="utf-8").strip()
    if len(token) < _SHORTEST_TOKEN:
        raise SpecError(
            f"{path}: Admin's token has {len(token)} characters; give {_SHORTEST_TOKEN} or more"
            " (`openssl rand -hex 32`)"
        )
    return token


def read(folder: Path) -> Deployment | None:
    """The deployment of the state file in `folder`; None without a file.

    Raises:
        SpecError: the file has other content than `write` gives.
    """
    path = folder / _FILE
    try:
        return Deployment(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise SpecError(
            f"{path}: not the state of a deployment ({error}); remove the file"
        ) from None


def write(folder: Path, deployment: Deployment) -> None:
    """Write the state file, tokens included: atomically, readable by the owner only."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix=".deployment-")
    with os.fdopen(handle, "w") as file:
        json.dump(asdict(deployment), file)
    os.replace(name, folder / _FILE)


def clear(folder: Path) -> None:
    """Remove the state file; does nothing without a file."""
    (folder / _FILE).unlink(missing_ok=True)
