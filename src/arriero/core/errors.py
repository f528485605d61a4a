"""Every error that arriero raises on purpose.

    ArrieroError
    ├── ConfigError            a flag or value that cannot be used            -> exit code 2 / HTTP 400
    ├── NotFoundError          unknown instance or request                    -> HTTP 404
    ├── ConflictError          the operation makes no sense in this state     -> HTTP 409
    │   └── UnmovableError     the request cannot move; it runs on where it is
    ├── UnavailableError       no instance can take the request               -> HTTP 503
    ├── LaunchError            an instance did not start
    ├── ProtocolError          a peer sent something that the protocol forbids
    ├── PolicyError            a scheduling policy raised; the message has its inputs
    └── TransportError         KV blocks could not be exported, moved or imported

Each message says what was wrong, with the value, and what to do about it.
"""


class ArrieroError(Exception):
    """Root of the tree; ``status`` is the HTTP status that the admin API answers with."""

    status = 500


class ConfigError(ArrieroError):
    """A configuration value is invalid."""

    status = 400


class NotFoundError(ArrieroError):
    """No such instance or request."""

    status = 404


class ConflictError(ArrieroError):
    """The operation is valid, but not in the present state."""

    status = 409


class UnmovableError(ConflictError):
    """This request cannot be migrated; it keeps running where it is."""


class UnavailableError(ArrieroError):
    """No instance is able to take the request."""

    status = 503


class LaunchError(ArrieroError):
    """An instance did not start."""


class ProtocolError(ArrieroError):
    """A message that the protocol does not allow."""


class PolicyError(ArrieroError):
    """A scheduling policy raised, or chose what cannot be."""


class TransportError(ArrieroError):
    """KV blocks could not be exported, transported or imported."""
