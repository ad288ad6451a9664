"""What `arriero up` leaves behind for `status`, `down` and the clients: one small JSON file.

Knows the file; knows nothing of the processes it speaks of.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from arriero.shards.errors import SpecError

_FILE = "deployment.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """A deployment that is starting or serving.

    Attributes:
        ray_address: of the cluster's GCS, host:port; "" while a local cluster starts.
        node_address: of the driver on that cluster's network, or None for Ray's own choice.
        gateway: host:port of a gateway's gRPC for clients on this machine; "" until it listens.
        http: host:port of its HTTP; "" for none.
        admin: host:port of Admin; "" until it listens.
        admin_token: what it asks for.
        admin_ca: PEM of the authorities that its certificate is from; "" where it has none.
        admin_name: that its certificate is for; "" for the address's own.
        local_session: session id of the processes that `up` started; None on a joined cluster.
        local_folder: their temporary folder; None on a joined cluster.
        ray_token: what that cluster asks drivers for; "" on a joined one, where it is the user's.
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


def state_folder(given: Path | None) -> Path:
    """The folder given, else $ARRIERO_STATE, else $XDG_STATE_HOME/arriero, else ~/.local/state."""
    if given is not None:
        return given.absolute()
    if named := os.environ.get("ARRIERO_STATE"):
        return Path(named).absolute()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "arriero"


def read(folder: Path) -> Deployment | None:
    """The deployment noted in `folder`, or None.

    Raises:
        SpecError: the file is not one of ours.
    """
    path = folder / _FILE
    try:
        return Deployment(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise SpecError(f"{path}: not a deployment's state ({error}); remove the file") from None


def write(folder: Path, deployment: Deployment) -> None:
    """Note `deployment`, its tokens included, in `folder`: in one move, for its owner alone."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix=".deployment-")
    with os.fdopen(handle, "w") as file:
        json.dump(asdict(deployment), file)
    os.replace(name, folder / _FILE)


def clear(folder: Path) -> None:
    """Forget the deployment; safe when there is none."""
    (folder / _FILE).unlink(missing_ok=True)
