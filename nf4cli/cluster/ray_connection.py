"""Connect to a Ray cluster, or start one on this machine for the length of a run."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .. import stopping
from ..errors import MachineError

LOCAL = "local"
"""In place of an address: a cluster on this machine, for the length of the run."""
_ANSWER = 10  # seconds within which a cluster takes a connection


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Yield the module ray, connected to a cluster.

    Args:
        address: host:port, "auto" for the cluster of RAY_ADDRESS or of this machine, or LOCAL.

    Raises:
        MachineError: Ray is missing, no cluster answers, or it has another Python or Ray.
    """
    try:
        import ray
    except ImportError as error:
        raise MachineError(
            f"--ray needs the package ray ({error}): pip install 'nf4cli[ray]'"
        ) from error
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options |= {"address": "local", "include_dashboard": False}
        options["num_cpus"] = len(os.sched_getaffinity(0))
    else:
        options["address"] = address
        _require_answer(address)
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        if "ersion mismatch" in str(error):
            raise MachineError(
                f"the Ray cluster at {address!r} has another Ray or Python than this process: "
                f"{' '.join(str(error).split())}. Install the same on all nodes"
            ) from error
        if _is_about_token(error):
            raise MachineError(
                f"the Ray cluster at {address!r} asks for a token, or another one: set "
                "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what `ray get-auth-token` prints on "
                "its head"
            ) from error
        raise MachineError(_no_cluster(address, error)) from error
    finally:
        stopping.listen_again()  # Ray ends the process at a SIGTERM
    try:
        yield ray
    finally:
        ray.shutdown()


def _is_about_token(error: BaseException | None) -> bool:
    """Return whether an error, or what it came from, is about a token."""
    while error is not None:
        if "AuthenticationError" in f"{type(error).__name__} {error}":
            return True
        error = error.__cause__ or error.__context__
    return False


def _require_answer(address: str) -> None:
    """Raise MachineError if nothing listens at host:port: Ray itself tries for minutes."""
    stated = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host, colon, port = stated.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return  # "auto" on this machine, or a form that Ray explains
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER).close()
    except (OSError, OverflowError) as error:
        raise MachineError(_no_cluster(stated, error)) from error


def _no_cluster(address: str, why: object) -> str:
    return (
        f"no Ray cluster answers at {address!r} ({why}): start one with `ray start --head`, or "
        "give --ray local for one on this machine"
    )
