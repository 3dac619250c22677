"""Errors a user can act on: the message names the field, the value's problem and the fix."""


class SecateurError(ValueError):
    """Base of all errors whose message is meant to be read by the person who caused them."""

    @property
    def message(self) -> str:
        return str(self)


class CheckpointError(SecateurError):
    """A checkpoint directory that cannot be trusted or run."""


class PlanError(SecateurError):
    """A pruning request that makes no sense for these checkpoints."""


class DataError(SecateurError):
    """Rows that cannot be used as labelled examples."""


class ConfigError(SecateurError):
    """A configuration value that is unknown, malformed or contradicts another."""
