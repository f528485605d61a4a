"""Every error that arriero raises on purpose.

    ArrieroError
    ├── ConfigError            a flag or value that cannot be used            -> exit code 2 / HTTP 400
    ├── NotFoundError          unknown instance or request                    -> HTTP 404
    ├── GoneError              what was there is not kept any more            -> HTTP 410
    ├── ConflictError          the operation makes no sense in this state     -> HTTP 409
    │   └── UnmovableError     the request cannot move; it runs on where it is
    ├── OverloadedError        too many requests wait already                 -> HTTP 429
    ├── UnavailableError       no instance can take the request               -> HTTP 503
    ├── LaunchError            an instance did not start
    ├── ProtocolError          a peer sent something that the protocol forbids
    ├── PolicyError            a scheduling policy raised; the message has its inputs
    └── TransportError         KV blocks could not be exported, moved or imported

Each message says what was wrong, with the value, and what to do about it.
"""


class ArrieroError(Exception):
    """Root of the tree; ``status`` is the HTTP status that clients get, ``retry_after_s`` when to try again."""

    status = 500
    retry_after_s: float | None = None


class ConfigError(ArrieroError):
    """A configuration value is invalid."""

    status = 400


class NotFoundError(ArrieroError):
    """No such instance or request."""

    status = 404


class GoneError(ArrieroError):
    """It was there, and is not kept any more."""

    status = 410


class ConflictError(ArrieroError):
    """The operation is valid, but not in the present state."""

    status = 409


class UnmovableError(ConflictError):
    """This request cannot be migrated; it keeps running where it is."""


class OverloadedError(ArrieroError):
    """Too many requests wait already."""

    status = 429

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(ArrieroError):
    """No instance is able to take the request."""

    status = 503
    retry_after_s = 1.0


class LaunchError(ArrieroError):
    """An instance did not start."""


class ProtocolError(ArrieroError):
    """A message that the protocol does not allow."""


class PolicyError(ArrieroError):
    """A scheduling policy raised, or chose what cannot be."""


class TransportError(ArrieroError):
    """KV blocks could not be exported, transported or imported."""
